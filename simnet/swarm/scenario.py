"""A scenario: which machines there are, when they come and go, and how far news travels.

Read from TOML; every key is listed here, with its unit in its name. Two numbers ``[low, high]``
mean that each node draws its own, evenly.

    title = "Two continents"
    blocks = 48                     # of the model
    block_bytes = 200_000_000       # what loading one block transfers
    duration_s = 1200
    steady_from_s = 600             # from here on the means of the report are taken

    [[nodes]]
    name = "europe"
    count = 70
    memory_blocks = [4, 12]         # or a list of three or more to choose from
    rate = [400, 800]               # compute, block-tokens/s
    bytes_per_s = [20e6, 100e6]     # for loading blocks
    joins_s = [0, 60]
    up_s = 3600                     # mean time until a node leaves; absent: it stays
    down_s = 300                    # mean time until it comes back; absent: it does not
    crash_share = 0.5               # of those who leave, without a goodbye
    day_s = 1200                    # a day: nodes are there for the awake share of it
    awake_share = 0.6
    dawn = 0.25                     # when in the day this group's nodes come, 0 to 1

    [[departures]]
    at_s = 600
    over_s = 10
    share = 0.45
    crash_share = 0.5
    group = "europe"                # absent: all

    [news]                          # gossip, as delays of views
    spread_s = [0.2, 1.5]           # from a node to a view
    far_s = 0.2                     # more between two groups, if regions = true
    death_s = [4, 12]               # until a view has dropped a crashed node
    regions = false                 # whether groups are far apart

    [sessions]
    every_s = 5                     # between two that start
    mean_s = 90                     # they last
"""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from petalnode.errors import UsageError

SCENARIOS = Path(__file__).parent.parent / "scenarios"
"""The bundled ones, ``<name>.toml``."""
MAX_NODES = 20_000
MAX_BLOCKS = 1024
_REMEDY = "Mend the scenario file; the docstring of simnet/swarm/scenario.py lists its keys."


class ScenarioError(UsageError):
    """The scenario cannot be run as it is written."""

    usual_remedy = _REMEDY


Span = tuple[float, float]
"""Low and high of what is drawn evenly."""


@dataclass(frozen=True)
class Group:
    """Nodes of one kind. ``memory_blocks``: two are low and high, more are a choice."""

    name: str
    count: int
    memory_blocks: tuple[int, ...]
    rate: Span
    bytes_per_s: Span = (20e6, 100e6)
    rate_sigma: float = 0.0
    joins_s: Span = (0.0, 60.0)
    up_s: float = 0.0
    down_s: float = 0.0
    crash_share: float = 0.5
    day_s: float = 0.0
    awake_share: float = 1.0
    dawn: float = 0.0


@dataclass(frozen=True)
class Departure:
    """A share of the nodes leaves for good, spread over ``over_s``."""

    at_s: float
    share: float
    over_s: float = 0.0
    crash_share: float = 0.5
    group: str = ""


@dataclass(frozen=True)
class News:
    """How views lag behind."""

    spread_s: Span = (0.2, 1.5)
    far_s: float = 0.1
    death_s: Span = (4.0, 12.0)
    regions: bool = False


@dataclass(frozen=True)
class Sessions:
    """Clients: a session starts every ``every_s`` on average and lasts ``mean_s``."""

    every_s: float = 5.0
    mean_s: float = 90.0


@dataclass(frozen=True)
class Scenario:
    """What is simulated. Made by ``read_scenario`` or ``parse_scenario``."""

    title: str
    blocks: int
    duration_s: float
    steady_from_s: float
    nodes: tuple[Group, ...]
    block_bytes: float = 200e6
    departures: tuple[Departure, ...] = ()
    news: News = News()
    sessions: Sessions = Sessions()


def read_scenario(path: Path) -> Scenario:
    """The scenario in a TOML file. Raises ``ScenarioError``."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ScenarioError(
            f"The scenario {str(path)!r} cannot be read: {reason}.",
            "Name a TOML file, or one of the bundled scenarios.",
        ) from None
    try:
        plain = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{path.name} is not TOML: {error}.") from None
    return parse_scenario(plain)


def parse_scenario(plain: Mapping[str, Any]) -> Scenario:
    """The scenario in what a TOML parser returned. Raises ``ScenarioError``."""
    tables = {
        "nodes": tuple(_record(Group, "nodes", item) for item in _tables(plain, "nodes")),
        "departures": tuple(
            _record(Departure, "departures", item) for item in _tables(plain, "departures")
        ),
        "news": _record(News, "news", plain.get("news", {})),
        "sessions": _record(Sessions, "sessions", plain.get("sessions", {})),
    }
    scenario: Scenario = _record(Scenario, "the top level", dict(plain) | tables)
    _check_whole(scenario)
    return scenario


def _tables(plain: Mapping[str, Any], name: str) -> list[Any]:
    value = plain.get(name, [])
    if not isinstance(value, list):
        raise ScenarioError(f"{name} is not a list of tables.", f"Write [[{name}]].")
    return value


def _record(kind: Any, where: str, plain: object) -> Any:
    """``plain`` as a dataclass: no key unknown, none missing, all values checked."""
    if not isinstance(plain, Mapping):
        raise ScenarioError(f"{where} is not a table.")
    known = {item.name: item for item in fields(kind)}
    for name in plain:
        if name not in known:
            raise ScenarioError(f"{where} has no key {name!r}; it has {', '.join(known)}.")
    for name, item in known.items():
        if item.default is MISSING and name not in plain:
            raise ScenarioError(f"{where} lacks the key {name!r}.")
    return kind(**{name: _value(where, name, plain[name]) for name in plain})


_SPANS = ("rate", "bytes_per_s", "joins_s", "spread_s", "death_s")
_SHARES = ("share", "crash_share", "awake_share", "dawn")
_TEXTS = ("title", "name", "group")
_COUNTS = {"blocks": MAX_BLOCKS, "count": MAX_NODES}
_NOT_ZERO = ("rate", "bytes_per_s", "duration_s", "block_bytes", "every_s", "mean_s", "awake_share")


def _value(where: str, name: str, value: Any) -> Any:
    said = f"{name} in {where}"
    if name in ("nodes", "departures", "news", "sessions"):
        return value
    if name in _TEXTS:
        if not isinstance(value, str) or not value.isprintable():
            raise ScenarioError(f"{said} is not text.")
        return value
    if name == "regions":
        if not isinstance(value, bool):
            raise ScenarioError(f"{said} is not true or false.")
        return value
    if name in _COUNTS:
        return _whole(said, value, _COUNTS[name])
    if name == "memory_blocks":
        return _memory(said, value)
    if name in _SPANS:
        return _span(said, value, name in _NOT_ZERO)
    number = _number(said, value, name in _NOT_ZERO)
    if name in _SHARES and number > 1:
        raise ScenarioError(f"{said} is {number:g}, which is no share: it is more than 1.")
    return number


def _number(said: str, value: object, not_zero: bool = False) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1e15:  # type: ignore[operator]
        raise ScenarioError(f"{said} is not a number of at least 0.")
    if not_zero and value == 0:
        raise ScenarioError(f"{said} is 0, and must be more.")
    return float(value)  # type: ignore[arg-type]


def _whole(said: str, value: object, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ScenarioError(f"{said} is not a whole number in 1..{most}.")
    return value


def _span(said: str, value: object, not_zero: bool) -> Span:
    if not isinstance(value, list):
        number = _number(said, value, not_zero)
        return number, number
    if len(value) != 2:
        raise ScenarioError(f"{said} is not one number, and not low and high.")
    low, high = (_number(said, item, not_zero) for item in value)
    if low > high:
        raise ScenarioError(f"{said} has a low that is above its high.")
    return low, high


def _memory(said: str, value: object) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value, value]
    if len(items) < 2:
        raise ScenarioError(f"{said} is not one number, low and high, or a longer choice.")
    sizes = tuple(_whole(said, item, MAX_BLOCKS) for item in items)
    if len(sizes) == 2 and sizes[0] > sizes[1]:
        raise ScenarioError(f"{said} has a low that is above its high.")
    return sizes


def _check_whole(scenario: Scenario) -> None:
    if not scenario.nodes:
        raise ScenarioError("The scenario has no nodes.", "Add a [[nodes]] table.")
    if sum(group.count for group in scenario.nodes) > MAX_NODES:
        raise ScenarioError(f"The scenario has more than {MAX_NODES} nodes.")
    if scenario.steady_from_s >= scenario.duration_s:
        raise ScenarioError("steady_from_s is not before the end of duration_s.")
    names = {group.name for group in scenario.nodes}
    if len(names) < len(scenario.nodes):
        raise ScenarioError("Two groups of nodes have the same name.")
    for departure in scenario.departures:
        if departure.group and departure.group not in names:
            raise ScenarioError(f"departures name the group {departure.group!r}, which is none.")
