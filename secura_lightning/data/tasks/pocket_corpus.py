"""The pocket model's pretraining text as a task: rows without a prompt, scored by perplexity."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from secura_lightning.data.pocket import corpus
from secura_lightning.data.rows import Row
from secura_lightning.data.task import Split, Task


class PocketCorpus(Task):
    """Generated facts, arithmetic, sequences, simple English and general skills, as plain documents.

    Rows have an empty prompt, and their answer is the whole document. Validation and test documents are disjoint from
    all training documents and from each other; no document holds a prompt of the base-knowledge probe.

    Args:
        name: Name of the task.
        n_documents: Number of training documents, about 32 tokens each.
        n_validation: Number of validation documents.
        n_test: Number of test documents.
        exclude_kinds: Kinds of documents to leave out (keys of :data:`secura_lightning.data.pocket.corpus.MIXTURE`).
        seed: Seed of the training documents.
    """

    is_text = True

    def __init__(
        self,
        name: str = "corpus",
        n_documents: int = 200_000,
        n_validation: int = 200,
        n_test: int = 200,
        exclude_kinds: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, metric="perplexity", separator="", seed=seed)
        self.n_documents = n_documents
        self.n_validation = n_validation
        self.n_test = n_test
        self.exclude_kinds = tuple(exclude_kinds)

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split: endless for training, ``n_validation`` or ``n_test`` otherwise."""
        if split == "train":
            return corpus.documents(self.seed, exclude_kinds=self.exclude_kinds)
        both = corpus.heldout_text(self.n_validation + self.n_test, self.seed, self.exclude_kinds)
        return iter(both[: self.n_validation] if split == "validation" else both[self.n_validation :])

    def load(self, split: Split) -> list[Row]:
        """The split's documents as rows; training has ``n_documents`` of them."""
        count = {"train": self.n_documents, "validation": self.n_validation, "test": self.n_test}[split]
        return [
            Row(f"{self.name}/{split}/{i}", "", text)
            for i, text in zip(range(count), self.documents(split), strict=False)
        ]
