"""docs/engines.md says what LIMITS say: its tables are made from them.

`ORCH_UPDATE_GOLDEN=1 pytest` writes them anew; look at the difference before you commit it.
"""

import os
import re
from pathlib import Path

from orchestrator.registry import find
from orchestrator.spec import ParallelPlan, StageSpec

DOC = Path(__file__).resolve().parents[2] / "docs" / "engines.md"
ENGINES = ("torch", "deepspeed", "colossalai")
LAYOUTS = [
    {},
    {"zero": 1},
    {"zero": 2},
    {"zero": 3},
    {"zero": 2, "offload": "optimizer"},
    {"zero": 3, "offload": "all"},
    {"tensor": 2},
    {"tensor": 2, "zero": 1},
    {"tensor": 2, "zero": 3},
    {"tensor": 2, "sequence": True},
    {"ulysses": 2},
    {"ulysses": 2, "zero": 3},
    {"ulysses": 2, "tensor": 2},
    {"pipeline": 2},
    {"pipeline": 2, "zero": 1},
    {"pipeline": 2, "zero": 2},
    {"pipeline": 2, "interleave": 2},
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "pipeline": 2, "zero": 1},
    {"tensor": 2, "pipeline": 2, "zero": 1, "sequence": True},
    {"compile": True},
]


def yaml(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def table():
    """What each engine runs of the layouts that people ask for, and in which precision."""
    lines = [f"| layout | {' | '.join(ENGINES)} |", "|---" * (len(ENGINES) + 1) + "|"]
    for layout in LAYOUTS:
        cells = []
        for engine in ENGINES:
            runs = []
            for precision in ("fp32", "bf16"):
                parallel = ParallelPlan(**{k: v for k, v in layout.items() if k != "compile"})
                whole = {"compile": layout.get("compile", False), "precision": precision, "parallel": parallel}
                stage = StageSpec(kind="pretrain", engine=engine, **whole)
                runs += [precision] * (not find("jobs.engines", engine).LIMITS.refusals(stage))
            cells.append({2: "yes", 0: "-"}.get(len(runs), f"{', '.join(runs)} only"))
        words = ", ".join(f"`{key}: {yaml(value)}`" for key, value in layout.items())
        lines.append(f"| {words or 'none: each rank holds all'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def words(key, values):
    """`zero: 1` or `2`; a setting that is on or off is named alone, or as off."""
    if isinstance(values[0], bool):
        return f"`{key}`" if values == (True,) else f"`{key}` off"
    return f"`{key}` " + " or ".join(f"`{yaml(v)}`" for v in values)


def refusals():
    """Every rule of every engine."""
    lines = ["| engine | does not run | because | instead |", "|---|---|---|---|"]
    for engine in ENGINES:
        for refusal in find("jobs.engines", engine).LIMITS.refused:
            when = ", ".join(words(key, values) for key, values in refusal.when.items())
            lines.append(f"| {engine} | {when} | {refusal.why} | {refusal.instead} |")
    return "\n".join(lines)


def settings():
    """Every key that an engine takes of `engine_config`."""
    lines = ["| key | it changes |", "|---|---|"]
    taken = {engine: find("jobs.engines", engine).LIMITS.allowed for engine in ENGINES}
    assert [engine for engine in ENGINES if taken[engine]] == ["deepspeed"]
    return "\n".join(lines + [f"| `{key}` | {what} |" for key, what in taken["deepspeed"].items()])


def test_the_tables_are_those_of_limits():
    text = DOC.read_text()
    for name, made in (("layouts", table()), ("refusals", refusals()), ("settings", settings())):
        between = re.compile(f"(?<=<!-- {name}: made of LIMITS -->\n\n).*?(?=\n*<!-- end -->)", re.DOTALL)
        assert between.search(text), f"docs/engines.md has no place for `{name}`"
        if os.environ.get("ORCH_UPDATE_GOLDEN"):
            text = between.sub(lambda _, made=made: made, text, count=1)
            DOC.write_text(text)
        assert between.search(text)[0] == made
