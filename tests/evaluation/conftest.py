import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.evaluation.tiny import byte_tokenizer, tiny_llama


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()
