# SPDX-License-Identifier: Apache-2.0
"""Examples: lines to tokens of prompt and answer, with and without a chat template."""

import json

import pytest
from helpers import tiny_tokenizer

from deltaweave.gates.examples import encode_example, load_examples
from deltaweave.gates.experts import GateError

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(path, *entries):
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return path


def test_prompt_and_completion(tokenizer):
    found = encode_example({"prompt": "1+1=", "completion": "2"}, tokenizer, "line")
    assert tokenizer.decode(found.prompt) == "1+1="
    assert tokenizer.decode(found.answer) == "2<eos>"
    assert encode_example({"prompt": "1+1=", "answer": "2"}, tokenizer, "line") == found


def test_messages_train_on_the_last_answer_alone(tokenizer):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "1+1?"), ("assistant", "2")]
    entry = {"messages": [{"role": role, "content": content} for role, content in turns]}
    found = encode_example(entry, tokenizer, "line")
    assert tokenizer.decode(found.prompt) == "u: hi\na: hello<eos>\nu: 1+1?\na: "
    assert tokenizer.decode(found.answer) == "2<eos>"  # what the template puts behind the end is never written


def test_chat_wraps_prompts_as_messages(tokenizer):
    plain = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
    chat = encode_example({"prompt": "1+1?", "completion": "2"}, tokenizer, "line", chat=True)
    assert chat == encode_example(plain, tokenizer, "line")


def test_file_keeps_short_examples_and_counts_the_others(tokenizer, tmp_path):
    path = written(
        tmp_path / "a.jsonl", {"prompt": "1+1=", "completion": "2"}, "", {"prompt": "1" * 40, "completion": "2"}
    )
    found = load_examples(path, tokenizer, max_length=20)
    assert (len(found.examples), found.dropped) == (1, 1)
    described = found.describe()
    assert described["answer_tokens"] == 2
    assert len(described["sha256"]) == 64


def test_split_is_a_partition(tokenizer, tmp_path):
    path = written(tmp_path / "a.jsonl", *({"prompt": f"{n}=", "completion": str(n)} for n in range(10)))
    whole = load_examples(path, tokenizer)
    rest, held = whole.split(0.3, seed=1)
    assert (len(rest.examples), len(held.examples)) == (7, 3)
    assert {*rest.examples, *held.examples} == {*whole.examples}
    assert whole.split(0.3, seed=1) == (rest, held)
    with pytest.raises(GateError, match="leaves a set empty"):
        whole.split(0.01, seed=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl:2: not JSON"),
        ("[]", "a.jsonl:2: list, expected an object"),
        ({"text": "x"}, "neither `messages` nor `prompt`"),
        ({"prompt": "x"}, "no `completion`"),
        ({"prompt": "x", "completion": " "}, "must not be empty"),
        ({"prompt": "", "completion": "x"}, "must not be empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last one the assistant's"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "the last one the assistant's"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "turns with role and content"),
        ({"messages": "x"}, "turns with role and content"),
    ],
)
def test_a_bad_line_is_named(tokenizer, tmp_path, line, message):
    path = written(tmp_path / "a.jsonl", {"prompt": "1", "completion": "2"}, line)
    with pytest.raises(GateError, match=message):
        load_examples(path, tokenizer)


def test_templates_that_cannot_be_used(tokenizer, tmp_path):
    entry = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    tokenizer.chat_template = "{% if add_generation_prompt %}?{% else %}!{% endif %}"
    with pytest.raises(GateError, match="otherwise once it is there"):
        encode_example(entry, tokenizer, "line 3")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(GateError, match="line 3: the chat template refuses it"):
        encode_example(entry, tokenizer, "line 3")
    tokenizer.chat_template = None
    with pytest.raises(GateError, match="needs a chat template"):
        encode_example(entry, tokenizer, "line 3")


def test_no_example_left(tokenizer, tmp_path):
    with pytest.raises(GateError, match="no examples of at most 2 tokens"):
        load_examples(written(tmp_path / "a.jsonl", {"prompt": "1+1=", "completion": "2"}), tokenizer, max_length=2)
    with pytest.raises(GateError, match="not readable"):
        load_examples(tmp_path / "none.jsonl", tokenizer)
    (tmp_path / "b.jsonl").write_bytes(b"\xff")
    with pytest.raises(GateError, match="UTF-8"):
        load_examples(tmp_path / "b.jsonl", tokenizer)
