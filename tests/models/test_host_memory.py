"""What counts as free memory: the kernel's word, and the limits of control groups around us."""

import pytest

from petalnode.models.host_memory import available_bytes, read_text

MEMINFO = "MemTotal:       24684400 kB\nMemFree:        1000 kB\nMemAvailable:   4000 kB\n"
V2, V1 = "0::/a/b\n", "5:cpu:/a\n4:cpuacct,memory:/a/b\n0::/\n"
ROOT = "/sys/fs/cgroup"


def available(group: str = "", **files: str) -> int:
    """Return what a machine with these files has; names have _ for / below the groups' root."""
    named = {f"{ROOT}/{name.replace('__', '/')}": text for name, text in files.items()}
    texts = {"/proc/meminfo": MEMINFO, "/proc/self/cgroup": group} | {
        name.replace("/memory_", "/memory."): text for name, text in named.items()
    }
    return available_bytes(texts.get)


def test_the_page_cache_is_free() -> None:
    assert available() == 4000 * 1024


def test_a_control_group_is_a_limit() -> None:
    group = {"a__b__memory_max": "5000000\n", "a__b__memory_current": "3000000\n"}
    assert available(V2, **group) == 2_000_000
    files = "anon 1\ninactive_file 700000\nactive_file 5\n"
    assert available(V2, **group, a__b__memory_stat=files) == 2_700_000


def test_the_tightest_group_counts() -> None:
    inner = {"a__b__memory_max": "5000000", "a__b__memory_current": "3000000"}
    outer = {"a__memory_max": "6000000", "a__memory_current": "5500000"}
    assert available(V2, **inner, **outer) == 500_000
    assert available(V2, a__b__memory_max="max", a__b__memory_current="1", **outer) == 500_000


def test_a_container_sees_its_own_group_at_the_root() -> None:
    assert available(V2, memory_max="3000000", memory_current="1000000") == 2_000_000


def test_version_1() -> None:
    limit, usage = "memory__a__b__memory_limit_in_bytes", "memory__a__b__memory_usage_in_bytes"
    assert available(V1, **{limit: "3000000", usage: "1000000"}) == 2_000_000
    stat = {"memory__a__b__memory_stat": "inactive_file 9\ntotal_inactive_file 300\n"}
    assert available(V1, **{limit: "3000000", usage: "1000000"}, **stat) == 2_000_300
    assert available(V1, **{limit: str(2**63 - 4096), usage: "1"}) == 4000 * 1024


def test_a_group_over_its_limit_leaves_nothing() -> None:
    assert available(V2, a__memory_max="1000", a__memory_current="2000") == 0


@pytest.mark.parametrize("group", ["", "nonsense", "0::", "1:memory", "0::/gone", "\n:::\n"])
def test_files_that_are_not_as_expected(group: str) -> None:
    assert available(group, a__memory_max="much", a__memory_current="") == 4000 * 1024


def test_a_system_that_does_not_say() -> None:
    assert available_bytes(lambda path: None) > 0


def test_this_machine() -> None:
    assert read_text("/nowhere/at/all") is None
    assert available_bytes() > 1 << 20
