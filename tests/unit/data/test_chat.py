"""Conversations are written by the chat template, and what the assistant says is learned, with the end of its turn."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mtp_modules.data import ByteTokenizer, Chat, Document, HuggingFaceTokenizer, JsonLines, TextDataModule
from mtp_modules.data.documents import skipped_sentence
from tests.small_tokenizers import CHATML, FORGETFUL, LLAMA2, TURNS, chat_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi, Ann"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Ann?"},
    {"role": "assistant", "content": "Ann."},
]


def chat(tmp_path: Path, *talks: object, roles: list[str] | None = None) -> Chat:
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks), encoding="utf-8")
    return Chat(source=JsonLines(paths=[str(path)], field="messages"), roles=roles)


def learned(document: Document, used: HuggingFaceTokenizer) -> list[str]:
    """Return the runs of tokens that are trained on, as text."""
    assert document.tokens is not None
    assert document.loss_mask is not None
    runs: list[list[int]] = [[]]
    for token, counts in zip(document.tokens.tolist(), document.loss_mask.tolist(), strict=True):
        if counts:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [used.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["Hi<|im_end|>", "Ann.<|im_end|>"]),
        (LLAMA2, [" Hi </s>", " Ann. </s>"]),
        (FORGETFUL, ["Hi<|im_end|>", "Ann.<|im_end|>"]),
    ],
    ids=["chatml", "llama2", "forgetful"],
)
def test_the_assistant_is_learned_with_the_end_of_its_turn(tmp_path: Path, template: str, expected: list[str]) -> None:
    used = chat_tokenizer(template)
    (document,) = chat(tmp_path, TALK).documents(used)
    assert used.decode(document.tokens.tolist()) == used.render(TALK)  # nothing is doubled
    assert learned(document, used) == expected


def test_a_template_that_writes_earlier_turns_differently(tmp_path: Path) -> None:
    used = chat_tokenizer(FORGETFUL)
    talk = [*TALK[1:2], {"role": "assistant", "content": "why=>so"}, TALK[3], {"role": "assistant", "content": "a=>b"}]
    (document,) = chat(tmp_path, talk).documents(used)
    assert "a=>b<|im_end|>" in learned(document, used)
    assert not any("Ann?" in run for run in learned(document, used))


def said(*turns: object) -> list[dict[str, Any]]:
    """Return turns of a user and an assistant, one after the other; a dictionary is the assistant's whole message."""
    roles = ("user", "assistant")
    return [
        {"role": roles[index % 2], **(turn if isinstance(turn, dict) else {"content": turn})}
        for index, turn in enumerate(turns)
    ]


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


HEAD = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{% endfor %}" + HEAD
UPPER = TURN.replace("%s", "{{ m.content | upper }}")
LISTS = TURN.replace("%s", "{% for p in m.content %}{{ p.text }}{% endfor %}")
TOOLS = TURN.replace("%s", "{{ m.content }}{% if m.tool_calls %}<tool>{{ m.tool_calls[0].name }}</tool>{% endif %}")
THINK = TURN.replace(
    "%s",
    "{% set said = m.content.split('</think>')[-1] %}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>' + (m.content.split('</think>')[0][7:] if '</think>' in m.content else '') + '</think>' + said }}"
    "{% else %}{{ said }}{% endif %}",
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ANSWERS = (  # of tools, as a turn of the user, and without a special token's end between them, as in Qwen3
    "{% for m in messages %}{% if m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "<|im_start|>user{% endif %}\n<answer>{{ m.content }}</answer>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool>{{ c.name }}</tool>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}" + HEAD
)
UNBEGUN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CLOSED = (  # as Llama 2 has it, where white space at the end of the question goes
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content.rstrip() }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
CALL = {"content": None, "tool_calls": [{"name": "f"}]}
TOOL = {"role": "tool", "content": "42"}


@pytest.mark.parametrize(
    ("template", "talk", "expected"),
    [
        *((CHATML, said("x", answer), [f"{answer}<|im_end|>"]) for answer in ("s", "a", "start", "assistant", "\n")),
        (CHATML, said("im", "im"), ["im<|im_end|>"]),
        (CHATML, said("", "", "x", ""), ["<|im_end|>", "<|im_end|>"]),
        (CHATML, said("user\nx<|im_end|>\n<|im_start|>assistant\ny", "z"), ["z<|im_end|>"]),
        (LLAMA2, said("INST", "INST", " a ", " s "), [" INST </s>", " s </s>"]),
        (UPPER, said("cat", "sat", "dog", "ran"), ["SAT<|im_end|>", "RAN<|im_end|>"]),
        (LISTS, said(parts("cat"), parts("t"), parts("dog"), parts("r")), ["t<|im_end|>", "r<|im_end|>"]),
        (TOOLS, said("cat", CALL, "42", "ran"), ["<tool>f</tool><|im_end|>", "ran<|im_end|>"]),
        (TOOLS, said("cat", CALL | {"content": "s"}), ["s<tool>f</tool><|im_end|>"]),
        (
            THINK,
            said("cat", "<think>why</think>sat on", "dog", "<think>bird</think>ran"),
            ["sat on<|im_end|>", "<think>bird</think>ran<|im_end|>"],
        ),
        (THINK, said("cat", "sat", "dog", "ran"), ["sat<|im_end|>", "<think></think>ran<|im_end|>"]),
        (PLAIN, said("cat", "sat", "dog", "assistant"), ["sat", "assistant"]),
        (
            ANSWERS,
            [*said("cat", CALL), TOOL, TOOL | {"content": "4"}, {"role": "assistant", "content": "ran"}],
            ["<tool>f</tool><|im_end|>", "ran<|im_end|>"],
        ),
        (
            ANSWERS,
            said("cat", {"content": "s", "tool_calls": [{"name": "<|im_end|>"}, {"name": "<|im_start|>"}]}),
            ["s<tool><|im_end|></tool><tool><|im_start|></tool><|im_end|>"],
        ),
        (UNBEGUN, said("cat", "sat", "dog", "ran"), ["sat<|im_end|>", "ran<|im_end|>"]),
        (CLOSED, said("cat ", "sat", "dog", "ran"), [" sat </s>", " ran </s>"]),
        (CLOSED, said("cat [/INST] ", "sat [/INST]"), [" sat [/INST] </s>"]),
    ],
)
def test_what_is_learned_does_not_depend_on_what_is_said(
    tmp_path: Path, template: str, talk: Any, expected: list[str]
) -> None:
    used = chat_tokenizer(template)
    (document,) = chat(tmp_path, talk).documents(used)
    assert learned(document, used) == expected


@pytest.mark.parametrize(
    ("template", "talk"),
    [
        ("{% for m in messages %}{{ m.content[:1] }},{% endfor %}", said("cat", "sat")),
        (TURN.replace("%s", "{% if m.content is string %}{{ m.content }}{% endif %}"), said("cat", parts("sat"))),
        # What the template changed holds the template's own text.
        (TURN.replace("%s", "{{ m.content | replace('x', 'y') }}"), said("x<|im_end|>\n<|im_start|>assistant\nb", "c")),
        (UNBEGUN, said("cat", "")),
    ],
    ids=["cut", "parts that are not written", "ambiguous", "nothing said, and no turn begun"],
)
def test_a_turn_that_no_one_can_find_is_left_out_and_counted(tmp_path: Path, template: str, talk: Any) -> None:
    source = chat(tmp_path, talk)
    assert list(source.documents(chat_tokenizer(template))) == []
    assert "left out 1 whose messages are not found in what the template writes" in str(skipped_sentence(source))


def test_special_tokens_in_calls_of_tools_are_text(tmp_path: Path) -> None:
    used = chat_tokenizer(ANSWERS)
    end = used.encode_template("<|im_end|>")[0][0]
    talk = said("cat", {"content": "", "tool_calls": [{"name": "<|im_end|>"}]}, "dog", "ran")
    (document,) = chat(tmp_path, talk).documents(used)
    assert document.tokens is not None
    assert document.tokens.tolist().count(end) == 4
    assert used.decode(document.tokens.tolist()) == used.render(talk)


def test_a_token_that_begins_in_front_of_an_answer_is_learned(tmp_path: Path) -> None:
    """Where the generation prompt ends with a space, and the tokenizer's words begin with one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, "Ġs", "Ġsa", "Ġsat"])}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "s"), ("Ġs", "a"), ("Ġsa", "t")]))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    used = HuggingFaceTokenizer(tokenizer_json=fast.to_str(), chat_template=PLAIN)
    (document,) = chat(tmp_path, said("cat", "sat")).documents(used)
    assert learned(document, used) == [" sat"]


def test_special_tokens_in_messages_are_text_wherever_they_stand(tmp_path: Path) -> None:
    used = chat_tokenizer()
    ids = [used.encode_template(token)[0][0] for token in TURNS]
    for number, spelled in enumerate(("<|im_start|>", "<|im_end|>\n<|im_start|>user\n", "x<|im_start|>y")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (document,) = chat(folder, said(spelled, spelled)).documents(used)
        tokens = document.tokens.tolist()
        assert [tokens.count(token) for token in ids] == [2, 2, 0, 0]
        assert tokens[0] == ids[0]
        assert used.decode(tokens) == used.render(said(spelled, spelled))


def test_other_roles_are_learned_if_they_are_named(tmp_path: Path) -> None:
    used = chat_tokenizer()
    (document,) = chat(tmp_path, TALK, roles=["user"]).documents(used)
    assert learned(document, used) == ["Hi, Ann<|im_end|>", "Ann?<|im_end|>"]
    source = chat(tmp_path, TALK[:2], [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}])
    (document,) = source.documents(used)
    assert learned(document, used) == ["!<|im_end|>"]
    assert skipped_sentence(source) == "Chat: left out 1 without a turn of assistant (such as 'talks.jsonl:1')."


def test_special_tokens_that_a_user_spells_are_text(tmp_path: Path) -> None:
    used = chat_tokenizer()
    talk = [{"role": "user", "content": "what is <|im_end|>?"}, {"role": "assistant", "content": "</s> ends"}]
    (document,) = chat(tmp_path, talk).documents(used)
    ends = [used.encode_template(token)[0][0] for token in TURNS]
    assert [token for token in document.tokens.tolist() if token in ends] == [ends[0], ends[1], ends[0], ends[1]]
    assert used.decode(document.tokens.tolist()) == used.render(talk)
    assert learned(document, used) == ["</s> ends<|im_end|>"]


@pytest.mark.parametrize(
    ("talk", "used", "message"),
    [
        (TALK, ByteTokenizer(), "Chat: ByteTokenizer has no chat template; take the HuggingFaceTokenizer"),
        (TALK, chat_tokenizer(None), "Chat: HuggingFaceTokenizer has no chat template"),
        (TALK, chat_tokenizer("{{ raise_exception('no') }}"), r"the chat template rejects a conversation \(no\)"),
        ([{"text": "?"}], chat_tokenizer(), "'talks.jsonl:1' has a message without role and content"),
        (said("?", ["!"]), chat_tokenizer(), "'talks.jsonl:1' has a message whose content is a list of something else"),
        ("once", chat_tokenizer(), "'talks.jsonl:1' holds no messages; name the field that does"),
    ],
)
def test_conversations_that_cannot_be_written_are_refused(tmp_path: Path, talk: Any, used: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(chat(tmp_path, talk).documents(used))


def test_conversations_are_packed_whole_if_that_is_asked_for(tmp_path: Path) -> None:
    talks = [
        [{"role": "user", "content": "?" * (number % 7)}, {"role": "assistant", "content": "!" * (1 + number % 5)}]
        for number in range(40)
    ]
    chat(tmp_path, *talks)
    data = TextDataModule(
        train=[str(tmp_path / "talks.jsonl")],
        window=64,
        lookahead=3,
        batch_size=2,
        tokenizer=chat_tokenizer(),
        keep_whole=True,
    )
    assert data.tokenizer is not None
    begin, end = (data.tokenizer.encode_template(token)[0][0] for token in TURNS[:2])
    seen = 0
    for batch in data.train_dataloader():
        for tokens, documents, mask in zip(batch["tokens"], batch["document_ids"], batch["loss_mask"], strict=True):
            assert tokens.shape == (67,)
            assert not mask[documents == 67].any()
            for document in documents[documents < 67].unique():
                inside = tokens[documents == document]
                assert inside[0] == begin
                assert (inside == end).sum() == 2  # both turns
                seen += 1
    assert seen == 40


def test_of_several_templates_the_default_one_is_taken(tmp_path: Path) -> None:
    fast = FastTokenizer.from_str(chat_tokenizer()._fast.to_str())
    several = {"default": CHATML, "other": LLAMA2}
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", chat_template=several).save_pretrained(tmp_path)
    assert HuggingFaceTokenizer(pretrained=str(tmp_path)).chat_template == CHATML
