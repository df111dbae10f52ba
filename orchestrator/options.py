"""Arguments and options that several commands of `orch` share."""

import math
import os
from pathlib import Path
from typing import Any

import click


def _complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Experiments and runs below the runs folder that is in force."""
    root = Path((ctx.find_root().params or {}).get("runs") or os.environ.get("ORCH_RUNS") or "runs")
    found = [f.parent.relative_to(root) for f in root.glob("*/*/run.json")]
    return sorted(n for n in {str(p) for f in found for p in (f, f.parent)} if n.startswith(incomplete))


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
CONFIG = click.argument("config")
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
RUN = click.argument("run", shell_complete=_complete_run)
ANY_RUN = click.argument("run", required=False, shell_complete=_complete_run)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
STAGES = click.option("--stage", "stages", multiple=True, metavar="NAME", help="Only this stage; may be given again.")
STEP = click.option("--step", type=click.IntRange(0), metavar="N", help="Which checkpoint. Default: the newest.")
AVERAGE = click.option("--average", is_flag=True, help="Of PPO: the moving average of the weights.")
DETACH = click.option("-d", "--detach", is_flag=True, help="Return at once and leave it running.")


class Finite(click.FloatRange):
    """A number within bounds; NaN is within none, and infinity is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As a float."""
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{found} is no finite number.", param, ctx)
        return found
