"""Small tokenizers of both families, made here so that no download is needed."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxft.data.reviews import review_tokenizer
from jaxft.data.tasks import TASKS
from jaxft.data.tokenization import make_text_tokenizer


@pytest.fixture(scope="session")
def bert():
    return make_text_tokenizer(review_tokenizer())


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """A byte-level tokenizer as RoBERTa has, in which each label word after a space is one token."""
    words = [f" {word}" for task in TASKS.values() for word in task.label_words]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*words * 3, " It was . ? , news"], trainer)
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
    return tokenizer


@pytest.fixture(scope="session")
def roberta(byte_level):
    return make_text_tokenizer(byte_level)
