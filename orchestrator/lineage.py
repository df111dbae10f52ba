"""What a run was made of: from the corpus to its checkpoint, with the hash of all that lies between.

Read from the run folders and the data folder alone; MLflow is not asked. What a stage read and loaded is what its job
noted when it started (``attempts/``), and what it was made from is what its own spec says, not what lies there or is
asked for now. Where files have changed, the tree says so.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from orchestrator.run import SHORT, Checkpoint, Run, State, file_sha256, read_json
from orchestrator.spec import DataSpec, Experiment, waits_for

if TYPE_CHECKING:
    from rich.tree import Tree

BUILTIN = "builtin:"


class Saved(TypedDict):
    """The newest checkpoint of a run."""

    step: int
    manifest_sha256: str
    tokenizer_sha256: str
    data_sha256: str  # its order and content: the fingerprint


@dataclass(frozen=True, kw_only=True)
class Link:
    """One stage of a chain."""

    run: str
    kind: str
    state: str  # `missing` where there is no run
    mlflow_run_id: str
    made_from: list[str]  # the stages it waits for
    read: dict[str, str]  # files of examples, or of the model that was imported, with their SHA-256
    loaded: dict[str, Checkpoint]  # by stage
    saved: Saved | None
    measured: dict[str, float]  # on held-out data, last
    changed: list[str]  # what is not any more what was read or loaded


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The corpus, the stages asked for, and every stage that has a part in one of them, in order."""

    corpus: dict[str, Any]  # folder, tokenizer, sources with sizes and hashes
    stages: dict[str, Link]

    def to_json(self) -> dict[str, Any]:
        """What `orch lineage --json` prints."""
        return asdict(self)


def of(runs: Sequence[Run], state: Callable[[Run], State]) -> Lineage:
    """Where ``runs``, of one experiment, come from; ``state`` says how a run stands."""
    root, newest = runs[-1].root, runs[-1].spec()
    specs: dict[str, Experiment] = {}  # each stage's own
    ordered: list[str] = []

    def visit(stage: str, named_by: Experiment) -> None:
        if stage in specs:
            return
        run = _run(root, newest.name, stage)
        own = specs[stage] = run.spec() if run.key else named_by
        for other in waits_for(own, stage):
            visit(other, own)
        ordered.append(stage)

    for run in runs:
        visit(run.stage, newest)
    now = cache(_now)  # several stages may have read the same file
    links = {stage: _link(_run(root, newest.name, stage), specs[stage], state, now) for stage in ordered}
    return Lineage(corpus=_corpus(newest), stages=links)


def noted(run: Run) -> tuple[dict[str, str], dict[str, Checkpoint]]:
    """What the attempts of ``run`` read and the checkpoints of other stages that they loaded, newest.

    Only of attempts that had a part in what is saved: they were let begin, or, where nothing is trained, ended well.
    """
    read: dict[str, str] = {}
    loaded: dict[str, Checkpoint] = {}
    for attempt in run.attempts():
        if not ("checkpoint" in attempt.phases or attempt.cause == "done"):
            continue
        if not attempt.from_step:
            read, loaded = {}, {}  # it began anew
        read |= attempt.read
        loaded |= attempt.loaded
    return read, loaded


def saved(run: Run) -> Saved | None:
    """The newest checkpoint of ``run``; None where there is none."""
    from jobs.runtime import checkpoint

    for step in checkpoint.committed(run.checkpoints):
        folder = checkpoint.folder_of(run.checkpoints, step)
        identity = checkpoint.identity_of(folder)
        return {
            "step": step,
            "manifest_sha256": file_sha256(folder / checkpoint.MANIFEST),
            "tokenizer_sha256": identity.get("tokenizer", ""),
            "data_sha256": identity.get("data", ""),
        }
    return None


def measured(run: Run) -> dict[str, float]:
    """What ``run`` last reached on held-out data."""
    last: dict[str, float] = {}
    for line in run.metrics().values():
        last |= {key: value for key, value in line.items() if key.startswith("val/")}
    return last


def _run(root: Path, experiment: str, stage: str) -> Run:
    """The run of ``stage``, or one without a key that stands for it."""
    folder = root / experiment / stage
    if (folder / "run.json").exists():
        return Run.load(folder)
    return Run(folder=folder, experiment=experiment, stage=stage, index=0, key="")


def _link(run: Run, experiment: Experiment, state: Callable[[Run], State], now: Callable[[Path], str]) -> Link:
    read, loaded = noted(run)
    here = saved(run)
    return Link(
        run=run.name,
        kind=experiment.stages[run.stage].kind,
        state=state(run) if run.key else "missing",
        mlflow_run_id=read_json(run.folder / "tracking.json", {}).get("run_id", ""),
        made_from=waits_for(experiment, run.stage),
        read=read,
        loaded=loaded,
        saved=here,
        measured=measured(run),
        changed=[*_changed(run, read, loaded, now), *_retokenized(here, experiment.data, now)],
    )


def _now(file: Path) -> str:
    """The SHA-256 of ``file``; empty where it is gone."""
    return file_sha256(file) if file.is_file() else ""


def _changed(
    run: Run, read: dict[str, str], loaded: dict[str, Checkpoint], now: Callable[[Path], str]
) -> Iterator[str]:
    """What ``run`` read and loaded and is not the same any more. Of a checkpoint that was retired nothing is said."""
    from jobs.runtime import checkpoint

    for file, digest in read.items():
        if file.startswith(BUILTIN):
            continue
        if (found := now(Path(file))) != digest:
            yield f"`{file}` was {digest[:SHORT]}, and is {found[:SHORT] or 'gone'}"
    for stage, was in loaded.items():
        manifest = checkpoint.folder_of(run.folder.parent / stage / "checkpoints", was["step"]) / checkpoint.MANIFEST
        if manifest.exists() and (found := now(manifest)) != was["manifest_sha256"]:
            yield f"step {was['step']} of `{stage}` was {was['manifest_sha256'][:SHORT]}, and is {found[:SHORT]}"


def _retokenized(here: Saved | None, data: DataSpec, now: Callable[[Path], str]) -> Iterator[str]:
    from jobs.runtime.hf import tokenizer_of

    was, file = here["tokenizer_sha256"] if here else "", tokenizer_of(data)
    if was and (found := now(file)) != was:
        yield f"the tokenizer `{file}` was {was[:SHORT]}, and is {found[:SHORT] or 'gone'}"


def _corpus(experiment: Experiment) -> dict[str, Any]:
    """What `prepare` committed; no more than the folder before it did."""
    folder = Path(experiment.data.folder)
    record = read_json(folder / "dataset.json", {})
    keys = ("tokenizer_sha256", "vocab", "sources")
    return {"folder": str(folder)} | {key: record[key] for key in keys if key in record}


# On a terminal


def tree(lineage: Lineage) -> "Tree":
    """The corpus as the root; each stage under the last of those it was made from."""
    from rich.markup import escape
    from rich.tree import Tree

    corpus = lineage.corpus
    root = Tree(f"[bold]corpus[/] {escape(corpus['folder'])}", guide_style="dim")
    if "vocab" in corpus:
        root.add(f"tokenizer {corpus['vocab']:,} tokens {_hash(corpus['tokenizer_sha256'])}")
    for name, source in corpus.get("sources", {}).items():
        for split in ("train", "val"):
            if found := source.get(split):
                root.add(f"source {escape(name)}, {split}: {_sizes(found)} {_hash(found.get('bin_sha256', ''))}")
    placed: dict[str, Tree] = {}
    for name, link in lineage.stages.items():
        parents = [placed[other] for other in lineage.stages if other in link.made_from and other in placed]
        placed[name] = (parents[-1] if parents else root).add(_title(name, link))
        for line in _lines(link):
            placed[name].add(line)
    return root


def _title(name: str, link: Link) -> str:
    from orchestrator.show import STYLES

    mlflow = f" [dim]MLflow {link.mlflow_run_id}[/]" if link.mlflow_run_id else ""
    kind = f" ({link.kind})" if link.kind != name else ""
    return f"[bold]{name}[/]{kind} [{STYLES.get(link.state, 'dim')}]{link.state}[/]{mlflow}"


def _lines(link: Link) -> Iterator[str]:
    from rich.markup import escape

    for stage, was in link.loaded.items():
        yield f"from `{stage}` at step {was['step']} {_hash(was['manifest_sha256'])}"
    for file, digest in link.read.items():
        yield f"read {escape(file)} {_hash(digest)}"
    if link.saved:
        tokenizer = link.saved["tokenizer_sha256"]
        said = f", tokenizer {_hash(tokenizer)}" if tokenizer else ""
        yield f"checkpoint at step {link.saved['step']} {_hash(link.saved['manifest_sha256'])}{said}"
    if link.measured:
        yield ", ".join(f"{key.removeprefix('val/')} {value:.4g}" for key, value in link.measured.items()) + " held out"
    for what in link.changed:
        yield f"[bold red]changed since[/]: {escape(what)}"


def _sizes(split: dict[str, Any]) -> str:
    size = f", {split['bytes'] / 1e6:,.1f} MB" if "bytes" in split else ""
    return f"{split['documents']:,} documents{size}, {split['tokens']:,} tokens"


def _hash(digest: str) -> str:
    return f"[dim]{digest[:SHORT]}[/]"
