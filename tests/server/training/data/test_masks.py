"""Token ids and loss masks: ids are the server's, and every learned token belongs to an answer or ends it."""

import pytest

from guanaco.models.text.chat_template import ChatTemplate, named_template
from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.training.data.masks import Encoded, Encoder
from guanaco.server.training.data.rows import Message, RefusalKind, Row, RowError
from support.models.tiny_tokenizers import TEMPLATE_TOKENS, TEMPLATES, write_byte_level, write_sentencepiece_like


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("byte_level")
    return Tokenizer.from_directory(write_byte_level(path, extra=TEMPLATE_TOKENS, eos_token="</s>"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(write_sentencepiece_like(tmp_path_factory.mktemp("sentencepiece")))


def chat(*contents: str, system: str | None = None, learned: tuple[bool, ...] | None = None) -> Row:
    messages = [] if system is None else [Message("system", system)]
    for number, content in enumerate(contents):
        is_answer = number % 2 == 1
        is_learned = is_answer and (learned is None or learned[number // 2])
        messages.append(Message("assistant" if is_answer else "user", content, learned=is_learned))
    return Row(1, messages=tuple(messages))


def pieces(tokenizer: Tokenizer, encoded: Encoded) -> list[str]:
    """The texts of the runs of learned tokens."""
    runs, before = [], False
    for index, learned in zip(encoded.ids, encoded.learned, strict=True):
        if learned:
            if not before:
                runs.append(b"")
            runs[-1] += tokenizer.token_bytes(index)
        before = learned
    return [run.decode() for run in runs]


def server_ids(tokenizer: Tokenizer, row: Row, template: ChatTemplate, *, prompt: bool = False) -> list[int]:
    messages = [message.for_template() for message in row.messages[: -1 if prompt else None]]
    return tokenizer.encode_chat(messages, add_generation_prompt=prompt, template=template)


ENDS = {
    "chatml": "<|im_end|>",
    "smollm": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "zephyr": "</s>",
    "phi": "<|end|>",
}


@pytest.mark.parametrize("name", sorted(ENDS))
def test_ids_are_the_servers_and_the_answers_with_their_ends_are_learned(byte_level: Tokenizer, name: str) -> None:
    template = ChatTemplate(TEMPLATES[name])
    end = byte_level.control_id(ENDS[name])
    assert end is not None
    encoder = Encoder(byte_level, eos_ids=[end], template=template)
    row = chat("Hello, how?", "Fine <|im_end|> </s>.", "And you?", "Ahoy, me hearties!")
    (encoded,) = encoder.encode(row)
    assert list(encoded.ids) == server_ids(byte_level, row, template)[: len(encoded.ids)]
    space = " " if name == "llama2" else ""
    runs = pieces(byte_level, encoded)
    answers = ("Fine <|im_end|> </s>.", "Ahoy, me hearties!")
    assert runs == [f"{space}{answer}{space}{ENDS[name]}" for answer in answers]
    assert encoded.ids[-1] == end
    assert encoded.learned[-1]
    assert sum(index == end for index, learned in zip(encoded.ids, encoded.learned, strict=True) if learned) == 2
    prompt = server_ids(byte_level, row, template, prompt=True)
    assert list(encoded.ids[: len(prompt)]) == prompt, "what the server sees when the last answer begins"
    assert encoded.learned[len(prompt)]
    assert not encoded.learned[len(prompt) - 1]


def test_only_answers_of_weight_one_are_learned(byte_level: Tokenizer) -> None:
    encoder = Encoder(byte_level, eos_ids=[2], template=ChatTemplate(TEMPLATES["chatml"]))
    (encoded,) = encoder.encode(chat("a", "Fine.", "b", "Hello.", learned=(True, False)))
    assert pieces(byte_level, encoded) == ["Fine.<|im_end|>"]
    assert encoded.ids[-1] == 2, "what comes after the last learned token is left out"


def test_an_end_that_belongs_to_the_next_turn_is_learned(byte_level: Tokenizer) -> None:
    """A template that writes the end of an answer only when another question follows."""
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'user' %}{{ ' </s>' if not loop.first }}<s>[INST] {{ m.content }}"
        " [/INST]"
        "{% else %} {{ m.content }}{% endif %}{% endfor %}"
    )
    end = byte_level.control_id("</s>")
    assert end is not None
    encoder = Encoder(byte_level, eos_ids=[end], template=template)
    row = chat("one", "Hello.", "two", "Fine.")
    (encoded,) = encoder.encode(row)
    assert pieces(byte_level, encoded) == [" Hello. </s>", " Fine. </s>"]
    longer = Row(1, messages=(*row.messages, Message("user", "three")))
    assert list(encoded.ids) == server_ids(byte_level, longer, template)[: len(encoded.ids)]


@pytest.mark.parametrize("name", ["guanaco", "guanaco-plain", "alpaca", "vicuna", "llama2", "chatml"])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_our_own_templates(request: pytest.FixtureRequest, kind: str, name: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    (eos,) = tokenizer.eos_ids
    template = named_template(name)
    row = chat("hello?", "the answer", "and now?", "no more")
    (encoded,) = Encoder(tokenizer, eos_ids=[eos], template=template).encode(row)
    whole = server_ids(tokenizer, row, template)
    same = min(len(whole), len(encoded.ids) - (name in ("guanaco", "guanaco-plain", "alpaca", "chatml")))
    assert list(encoded.ids[:same]) == whole[:same]
    first, last = pieces(tokenizer, encoded)
    assert first.strip().startswith("the answer")
    assert last.strip().startswith("no more")
    assert encoded.ids[-1] == eos if name != "chatml" or kind == "sentencepiece" else True
    if template.stop_strings and name not in ("vicuna", "chatml"):
        assert first.strip().endswith(template.stop_strings[0].split()[-1]), "the stop string ends an earlier answer"


def test_the_first_characters_of_an_answer_may_join_the_prompt(byte_level: Tokenizer) -> None:
    """A token that holds the prompt's end and the answer's beginning is the prompt's."""
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}{{ '\n' }}{% endif %}{% endfor %}"
    )
    encoder = Encoder(byte_level, eos_ids=[2], template=template)
    row = chat("a", "\nFine, thank")
    (encoded,) = encoder.encode(row)
    assert list(encoded.ids[:-1]) == server_ids(byte_level, row, template)
    assert pieces(byte_level, encoded)[-1].endswith("Fine, thank<|im_end|>")


def test_a_template_that_rewrites_history_gets_a_sequence_for_each_answer(byte_level: Tokenizer) -> None:
    template = ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think></think>"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = Encoder(byte_level, eos_ids=[2], template=template)
    row = chat("a", "Hello.", "b", "Fine.", "c", "Ahoy.", learned=(True, False, True))
    sequences = encoder.encode(row)
    found = [pieces(byte_level, sequence) for sequence in sequences]
    assert found == [["<think></think>Hello.<|im_end|>"], ["<think></think>Ahoy.<|im_end|>"]]
    whole = server_ids(byte_level, row, template)
    assert list(sequences[1].ids) == whole[: len(sequences[1].ids)]


def test_train_on_all_learns_everything_but_bos(sentencepiece: Tokenizer) -> None:
    encoder = Encoder(sentencepiece, eos_ids=[2], template=named_template("guanaco"), train_on="all")
    (encoded,) = encoder.encode(chat("hello", "the answer"))
    assert encoded.ids[0] == sentencepiece.bos_id
    assert encoded.learned == (False, *[True] * (len(encoded.ids) - 1))
    assert encoded.ids[-1] == 2


def test_texts_and_completions_are_what_completions_would_encode(sentencepiece: Tokenizer) -> None:
    encoder = Encoder(sentencepiece, eos_ids=[2])
    (text,) = encoder.encode(Row(1, text="one and all"))
    assert list(text.ids) == [*sentencepiece.encode("one and all", parse_control=True), 2]
    assert text.learned == (False, *[True] * (len(text.ids) - 1))
    (pair,) = encoder.encode(Row(1, prompt="one and", text=" all"))
    assert pair.ids == text.ids
    prompt = sentencepiece.encode("one and", parse_control=True)
    assert pair.learned == (*[False] * len(prompt), *[True] * (len(pair.ids) - len(prompt)))


def test_the_released_recipes_masks(sentencepiece: Tokenizer) -> None:
    """The script of 2023: BOS alone is the source, the text and EOS the target, human turns included."""
    text = "### Human: hello### Assistant: the answer### Human: one### Assistant: two"
    (encoded,) = Encoder(sentencepiece, eos_ids=[2], max_length=512).encode(Row(1, text=text))
    source, target = [sentencepiece.bos_id], [*sentencepiece.encode(text, add_bos=False), 2]
    assert list(encoded.ids) == source + target
    assert list(encoded.learned) == [False] * len(source) + [True] * len(target)


def test_a_row_that_is_too_long_is_refused_or_loses_whole_exchanges(byte_level: Tokenizer) -> None:
    template = ChatTemplate(TEMPLATES["chatml"])
    row = chat("a", "Hello.", "b", "Fine.", "c", "Ahoy.")
    (whole,) = Encoder(byte_level, eos_ids=[2], template=template).encode(row)
    short = Encoder(byte_level, eos_ids=[2], template=template, max_length=len(whole.ids) - 1)
    with pytest.raises(RowError, match=f"{len(whole.ids)} tokens") as refused:
        short.encode(row)
    assert refused.value.kind == RefusalKind.TOO_LONG
    (cut,) = short.encode(row, may_cut=True)
    assert cut.num_dropped_messages == 2
    assert pieces(byte_level, cut) == ["Hello.<|im_end|>", "Fine.<|im_end|>"]
    assert cut.ids[-1] == 2, "an answer that is kept keeps its end"
    with pytest.raises(RowError):
        Encoder(byte_level, eos_ids=[2], template=template, max_length=4).encode(row, may_cut=True)


def test_a_template_that_refuses_is_a_reason(byte_level: Tokenizer) -> None:
    template = ChatTemplate("{{ raise_exception('no system message here') }}")
    with pytest.raises(RowError, match="no system message here") as refused:
        Encoder(byte_level, eos_ids=[2], template=template).encode(chat("a", "b"))
    assert refused.value.kind == RefusalKind.TEMPLATE
