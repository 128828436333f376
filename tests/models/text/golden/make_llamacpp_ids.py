"""Records the ids that llama.cpp gives to our hard strings: llamacpp_demo_ids.json and llamacpp_sentencepiece_ids.json.

Run by hand where llama-cpp-python is installed beside our own packages, e.g. from /tmp with
PYTHONPATH=PEERS/site-packages:REPO/tests/support, `python …/make_llamacpp_ids.py DEMO.gguf [tokenizer.model]`.
The second file's vocabulary goes through a GGUF without tensors, so that llama.cpp's own SentencePiece code runs.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp

from guanaco.models.text.sentencepiece import read_sentencepiece
from support.models.hard_strings import HARD_STRINGS

HERE = Path(__file__).parent


def record(vocab: Path, out: Path, source: Path) -> None:
    """Every string without BOS and with control tokens as text."""
    llama = llama_cpp.Llama(str(vocab), vocab_only=True, verbose=False)
    ids = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in HARD_STRINGS]
    content: dict[str, Any] = {
        "llama_cpp_python": llama_cpp.__version__,
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "ids": dict(zip(HARD_STRINGS, ids, strict=True)),
    }
    out.write_text(json.dumps(content, ensure_ascii=True, separators=(",", ":")).replace('],"', '],\n"') + "\n")


def write_vocab(model_path: Path, out: Path) -> None:
    """A GGUF that holds nothing but the tokenizer of a SentencePiece model."""
    model = read_sentencepiece(model_path)
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(model.pieces)
    writer.add_token_scores(model.scores)
    writer.add_token_types(model.types)
    writer.add_bos_token_id(model.bos_id)
    writer.add_eos_token_id(model.eos_id)
    writer.add_add_space_prefix(model.add_dummy_prefix)
    # llama.cpp reads a model's shape even where it wants the vocabulary only.
    writer.add_context_length(16)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="the demo's GGUF")
    parser.add_argument("sentencepiece", type=Path, nargs="?", help="LLaMA's tokenizer.model")
    arguments = parser.parse_args()
    record(arguments.demo, HERE / "llamacpp_demo_ids.json", arguments.demo)
    if arguments.sentencepiece:
        with tempfile.TemporaryDirectory() as scratch:
            vocab = Path(scratch) / "vocab.gguf"
            write_vocab(arguments.sentencepiece, vocab)
            record(vocab, HERE / "llamacpp_sentencepiece_ids.json", arguments.sentencepiece)


if __name__ == "__main__":
    main()
