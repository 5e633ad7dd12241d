"""``python -m petalnode.simnet SCENARIO --seed N``: simulate a swarm, report, and draw it."""

import argparse
import json
import sys
from pathlib import Path

from petalnode.errors import PetalnodeError
from petalnode.simnet.swarm.policies import POLICIES
from petalnode.simnet.swarm.report import json_report, text_report
from petalnode.simnet.swarm.scenario import SCENARIOS, Scenario, read_scenario
from petalnode.simnet.swarm.simulation import Simulation


def main(arguments: list[str] | None = None) -> int:
    """0 done, 1 the scenario cannot be run; wrong usage exits with 2."""
    options = _parse(arguments)
    try:
        scenario = find_scenario(options.scenario)
    except PetalnodeError as error:
        print(f"{error.cause}\n{error.remedy}", file=sys.stderr)
        return 1
    meter = Simulation(scenario, options.rule, options.seed).run()
    if options.json:
        print(json.dumps(json_report(scenario, options.rule, options.seed, meter)))
    else:
        print(text_report(scenario, options.rule, options.seed, meter))
    return 0


def find_scenario(name: str) -> Scenario:
    """A bundled scenario by its name, or any by its file. Raises ``ScenarioError``."""
    bundled = SCENARIOS / f"{name}.toml"
    return read_scenario(bundled if bundled.is_file() else Path(name))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = ", ".join(sorted(path.stem for path in SCENARIOS.glob("*.toml")))
    parser = argparse.ArgumentParser(
        prog="python -m petalnode.simnet",
        description="Simulate a swarm that places its blocks, and draw how it fares.",
        epilog="Example: python -m petalnode.simnet mass-leave --seed 1 --rule paper",
    )
    parser.add_argument("scenario", metavar="SCENARIO", help=f"a TOML file, or one of: {names}")
    parser.add_argument("--seed", type=int, default=0, help="of all chance (default 0)")
    parser.add_argument(
        "--rule", choices=POLICIES, default="ours", help="who takes which blocks (default ours)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
