"""Fixtures of the tokenizers' tests: small tokenizers, and the files of one."""

from pathlib import Path

import pytest

from guanaco.models.text.tokenizer import Tokenizer
from support.models.tiny_tokenizers import TEMPLATE_TOKENS, write_byte_level


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer with the control tokens of every template."""
    return Tokenizer.from_directory(write_byte_level(tmp_path_factory.mktemp("tiny"), extra=TEMPLATE_TOKENS))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with the files of a byte-level tokenizer, to be changed."""
    return write_byte_level(tmp_path / "files")
