"""What the README says of the tree is so: every module has its line, every preset and command it names exists."""

import re
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text()


def test_every_module_has_one_line():
    listed = set(re.findall(r"^  ?(\S+\.py) ", README, flags=re.MULTILINE))
    there = {
        str(path.relative_to(REPO))
        for folder in ("orchestrator", "launch", "jobs", "benchmarks")
        for path in (REPO / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed == there


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (REPO / target.partition("#")[0]).exists(), target


def test_configs_and_commands_exist():
    from orchestrator.cli import cli

    for config in set(re.findall(r"configs/[\w.-]+\.yaml", README)):
        assert (REPO / config).exists(), config
    for command in set(re.findall(r"^orch (\w+)", README, flags=re.MULTILINE)):
        assert command in cli.commands, command
