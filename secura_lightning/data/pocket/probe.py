"""The base-knowledge probe: what the pocket model knew before it was tuned, asked for per kind of fact.

Two styles, told apart by the row's id (``capital/choice/004``):

* ``choice``: a statement without its object; the answer and three objects of the same type compete by likelihood;
* ``exact``: a question; the short answer is generated and compared.

Both use the wording that :func:`~.facts.held_out` keeps away from all training documents. The rows never serve for
training or calibration.
"""

from __future__ import annotations

import random

from secura_lightning.data.pocket import corpus
from secura_lightning.data.pocket.facts import KINDS, Fact, distractors, facts, held_out
from secura_lightning.data.rows import Row

PER_KIND = 32  # rows of a kind, half of them of either style
TEXT_DOCUMENTS = 110  # about 3 500 tokens
TEXT_SEED = 1_000_003  # apart from the seeds that pretraining validates on
CHOICES = 4


def probe_rows(seed: int = 0, per_kind: int = PER_KIND) -> list[Row]:
    """The probe's rows, kind by kind; within a kind no fact is asked twice.

    Args:
        seed: Seed of which facts are asked, of the wrong choices and of their order.
        per_kind: Rows of each kind: half choices (rounded up), half exact answers.

    Raises:
        ValueError: ``per_kind`` is below 2, or above the number of facts of some kind.
    """
    smallest = min(len(facts(kind)) for kind in KINDS)
    if not 2 <= per_kind <= smallest:
        raise ValueError(f"per_kind={per_kind}: give 2 to {smallest} rows per kind")
    rows: list[Row] = []
    for kind in KINDS:
        rng = random.Random(f"pocket probe/{seed}/{kind}")
        chosen = _chosen(rng, kind, per_kind)
        half = (per_kind + 1) // 2
        rows += [_choice(rng, fact, i) for i, fact in enumerate(chosen[:half])]
        rows += [_exact(fact, i) for i, fact in enumerate(chosen[half:])]
    return rows


def probe_text(seed: int = 0, count: int = TEXT_DOCUMENTS) -> list[str]:
    """Held-out documents of the training distribution, for token-weighted perplexity."""
    return corpus.heldout_text(count, seed=TEXT_SEED + seed)


def _chosen(rng: random.Random, kind: str, count: int) -> list[Fact]:
    """``count`` facts in random order; groups of very different size (the operators) are evened out."""
    groups: dict[str, list[Fact]] = {}
    for fact in facts(kind):
        groups.setdefault(_group(fact), []).append(fact)
    for members in groups.values():
        rng.shuffle(members)
    order = sorted(groups)
    dealt = [members[i] for i in range(count) for members in (groups[name] for name in order) if i < len(members)]
    dealt = dealt[:count]
    rng.shuffle(dealt)
    return dealt


def _group(fact: Fact) -> str:
    """What the rows of a kind are dealt over: the operator, or numbers against names; else all facts are one group."""
    if fact.kind == "arithmetic":
        return fact.subject.split()[1]
    if fact.kind == "sequence":
        return "number" if fact.object.isdigit() else "name"
    return ""


def _choice(rng: random.Random, fact: Fact, index: int) -> Row:
    choices = [fact.object, *distractors(rng, fact, CHOICES - 1)]
    rng.shuffle(choices)
    return Row(f"{fact.kind}/choice/{index:03d}", held_out(fact)[0], fact.object, tuple(choices), fact.kind)


def _exact(fact: Fact, index: int) -> Row:
    return Row(f"{fact.kind}/exact/{index:03d}", f"Question: {held_out(fact)[1]}\nAnswer:", fact.object, (), fact.kind)
