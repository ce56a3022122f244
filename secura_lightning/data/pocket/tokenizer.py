"""Train the pocket model's tokenizer: byte-level BPE over its own corpus, digits one by one.

    python -m secura_lightning.data.pocket.tokenizer OUT_DIR

The corpus holds no German, but the pocket tasks do: the German word forms and the tasks' English words join the
sample so that no task has to spell. Nothing is learned about them but how to cut them. The result is deterministic;
the command prints its sha256.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from secura_lightning.data.pocket import corpus, german

VOCABULARY = 1280
CONTEXT = 512
SPECIAL = ("<pad>", "<bos>", "<eos>")
SAMPLE = 40_000  # documents
REPEATS = 150  # how often each of the tasks' words is counted
# a word, one digit, or a run of marks, each with the space before it; then white space
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TASK_WORDS = (
    "Problem Solution Article Highlight English German Premises Conclusion Choices Answer Each Every All No "
    "Some If then minister mayor teacher doctor king president engineer judge club police government company "
    "team bank city family school party court parliament child bridge factory airport station road hospital "
    "museum market church castle hotel tower library garden train ship boat machine law plan letter newspaper "
    "report contract opened built bought sold showed visited closed found wrote planned signed changed paid "
    "praised checked repaired saved destroyed wants open build show visit close write sign change praise check "
    "repair save destroy famous expensive yesterday Munich Cologne Hamburg people million said spokesman "
    "visitors cost years apples coins books pens cards stamps eggs left together altogether gives buys loses "
    "has have many more How boxes each"
)


def train() -> PreTrainedTokenizerFast:
    """Train the tokenizer from the seeded sample."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def training_text() -> Iterator[str]:
    """The sample of the corpus, and the words of the tasks as often as a rare word of the corpus."""
    yield from corpus.sample(SAMPLE, seed=0)
    words = " " + " ".join(german.lexicon())
    for _ in range(REPEATS):
        yield words
        yield " " + TASK_WORDS


def config() -> LlamaConfig:
    """The pocket model's architecture: 1.5 M parameters, embeddings tied."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )


def main(argv: list[str]) -> int:
    """Write tokenizer and config into the folder named on the command line."""
    if len(argv) != 1:
        print("usage: python -m secura_lightning.data.pocket.tokenizer OUT_DIR", file=sys.stderr)
        return 2
    folder = Path(argv[0])
    train().save_pretrained(folder)
    config().save_pretrained(folder)
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    print(f"{folder / 'tokenizer.json'} sha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
