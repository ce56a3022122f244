"""Small files as the public benchmarks were published, and the same rows as the hub's copies hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secura_lightning.data.tasks.benchmark import Benchmark

_MRPC_HEAD = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
_TWEET = '"{}","1","Mon May 11 03:17:40 UTC 2009","NO_QUERY","ann","{}"\r\n'
_ARC_ROW = {
    "id": "Mercury_1",
    "question": {
        "stem": "What melts ice?",
        "choices": [{"text": "heat", "label": "1"}, {"text": "cold", "label": "2"}, {"text": "sand", "label": "3"}],
    },
    "answerKey": "1",
}
_ARC_HUB = {
    "question": "What melts ice?",
    "choices": {"text": ["heat", "cold", "sand"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}
_SWAG = {
    "activity_label": "Baking bread",
    "ctx_a": "[header] A man kneads dough. [title] The oven is hot.",
    "ctx_b": "he",
    "endings": ["puts it in. [substeps] It bakes.", "sings.", "leaves.", "sleeps."],
    "label": "0",
}
_BOOLQ = {"question": "is ice cold", "passage": "Ice is frozen water.", "answer": True, "title": "Ice"}
_TRIVIA = {
    "Question": "Who wrote Hamlet?",
    "QuestionId": "tc_1",
    "Answer": {"Value": "Shakespeare", "Aliases": ["William Shakespeare", "The Bard"], "Type": "WikipediaEntity"},
}
_NQ = {"question": "where is the eiffel tower", "answer": ["Paris", "Paris, France"]}
_WEB = {
    "url": "http://www.freebase.com/view/en/bieber",
    "targetValue": '(list (description "Jazmyn \\"Jaz\\" Bieber") (description Jaxon))',
    "utterance": "what is the name of justin bieber's siblings?",
}
_MMLU_ROW = '"Which planet, of these, is largest?",Mars,Jupiter,Venus,Earth,B\n'

ORIGINAL: dict[str, dict[str, Any]] = {
    "mrpc": {
        "msr_paraphrase_train.txt": _MRPC_HEAD
        + '1\t7\t8\tHe said "no.\tHe refused.\r\n0\t1\t2\tIt rained.\tHe left.\r\n',
        "msr_paraphrase_test.txt": _MRPC_HEAD + "0\t3\t4\tShares rose.\tShares fell.\r\n",
    },
    "sst2": {
        "train.tsv": 'sentence\tlabel\na warm , funny film \t1\nso dull \t0\nno " fun " at all \t0\nfine\t1\n',
        "dev.tsv": "sentence\tlabel\nit works .\t1\n",
        "test.tsv": "index\tsentence\n0\thidden labels\n",
    },
    "sentiment140": {
        "training.1600000.processed.noemoticon.csv": _TWEET.format(0, "caf\u00e9 closed, so sad")
        + _TWEET.format(4, "yay"),
        "testdata.manual.2009.06.14.csv": _TWEET.format(2, "it is a phone") + _TWEET.format(4, "love it"),
    },
    "mmlu": {
        "auxiliary_train/aux_law_90s.csv": _MMLU_ROW,
        "val/astronomy_val.csv": _MMLU_ROW,
        "test/astronomy_test.csv": _MMLU_ROW,
        "test/virology_test.csv": _MMLU_ROW,
    },
    "arc_easy": {f"ARC-Easy-{name}.jsonl": [_ARC_ROW] for name in ("Train", "Dev", "Test")},
    "arc_challenge": {f"ARC-Challenge-{name}.jsonl": [_ARC_ROW] for name in ("Train", "Dev", "Test")},
    "hellaswag": {f"hellaswag_{name}.jsonl": [_SWAG] for name in ("train", "val")},
    "boolq": {f"{name}.jsonl": [_BOOLQ] for name in ("train", "dev")},
    "triviaqa": {f"unfiltered-web-{name}.json": {"Data": [_TRIVIA], "Version": 1.0} for name in ("train", "dev")},
    "nq_open": {f"NQ-open.{name}.jsonl": [_NQ] for name in ("train", "dev")},
    "web_questions": {f"webquestions.examples.{name}.json": [_WEB] for name in ("train", "test")},
}
HUB: dict[str, dict[str, Any]] = {
    "mrpc": {"sentence1": 'He said "no.', "sentence2": "He refused.", "label": 1, "idx": 0},
    "sst2": {"sentence": "a warm , funny film ", "label": 1, "idx": 0},
    "sentiment140": {"text": "caf\u00e9 closed, so sad", "sentiment": 0, "user": "ann"},
    "arc_easy": _ARC_HUB,
    "arc_challenge": _ARC_HUB,
    "hellaswag": _SWAG,
    "boolq": _BOOLQ,
    "triviaqa": {
        "question": "Who wrote Hamlet?",
        "answer": {"value": "Shakespeare", "aliases": ["William Shakespeare", "The Bard"], "type": "WikipediaEntity"},
    },
    "nq_open": _NQ,
    "web_questions": {"question": _WEB["utterance"], "answers": ['Jazmyn "Jaz" Bieber', "Jaxon"]},
    "mmlu": {
        "question": "Which planet, of these, is largest?",
        "subject": "aux_law_90s",
        "choices": ["Mars", "Jupiter", "Venus", "Earth"],
        "answer": 1,
    },
}


def original(folder: Path, dataset: Any, **changes: Any) -> Benchmark:
    """A benchmark that reads its original files."""
    for name, content in ORIGINAL[dataset].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "\n".join(map(json.dumps, content)) if path.suffix == ".jsonl" else json.dumps(content)
        elif isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content.encode("latin-1" if dataset == "sentiment140" else "utf-8"))
    return Benchmark(dataset, path=str(folder), **changes)
