"""Conversations as batches: what the chat template writes, which tokens are scored, where the routing prompt ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import adaskip
from adaskip.batch import IGNORED
from adaskip.errors import DataError
from adaskip.training.data import Collator, loader
from adaskip.training.messages import read_messages
from adaskip.training.screening import as_conversation
from tests import toys
from tests.processors import CHAT, picture_processor, tokenizer

TWO = [
    {"role": "system", "content": "w9"},
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": [{"type": "text", "text": "w5 w6"}]},
]
RED = Image.new("RGB", (16, 16), "red")


def chatty(begin: str = "", template: str = CHAT) -> Any:
    words = tokenizer(begin)
    words.chat_template = template
    return words


def words_of(words: Any, ids: torch.Tensor) -> str:
    return " ".join(words.convert_ids_to_tokens(ids.tolist()))


def scored(words: Any, batch: adaskip.Batch, row: int = 0) -> str:
    return words_of(words, batch.labels[row][batch.labels[row] != IGNORED])


@pytest.mark.parametrize("begin", ["", "<s>"])
def test_every_turn_of_the_assistant_is_scored_and_nothing_else(begin: str) -> None:
    """Catches a later question that is learned, a turn that is not, a second beginning, a prompt beyond the first."""
    words = chatty(begin)
    batch = Collator(words)([{"messages": TWO}, {"messages": TWO[:3]}])
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    assert words_of(words, ids[0][mask[0]]) == "<s> w72 w9 w70 w1 w2 w71 w3 </s> w70 w4 w71 w5 w6 </s>"
    whole = words.apply_chat_template([*TWO[:4], {"role": "assistant", "content": "w5 w6"}], tokenize=False)
    assert ids[0][mask[0]].tolist() == words(whole, add_special_tokens=False)["input_ids"]  # as if read in one piece
    assert [scored(words, batch, row) for row in (0, 1)] == ["w3 </s> w5 w6 </s>", "w3 </s>"]
    assert [words_of(words, ids[row][batch.prompt_mask[row]]) for row in (0, 1)] == ["<s> w72 w9 w70 w1 w2 w71"] * 2
    assert batch.answer == ["w3", "w3"]
    # the line end behind an end token is the template's, not the assistant's
    assert Collator(words).rendered([{"messages": TWO}])[0]["turns"][:2] == [
        (" w3 </s>", True), ("\n w70 w4\n w71", False)
    ]  # fmt: skip
    asked = Collator(words, answers=False)([{"messages": TWO}])
    assert words_of(words, asked.inputs["input_ids"][0]) == "<s> w72 w9 w70 w1 w2 w71"
    assert bool((asked.labels == IGNORED).all())


def test_later_turns_move_no_decision_and_no_kl_of_their_own() -> None:
    """Routers read the prompt before the first answer; the KL is over the assistant's tokens of both turns alone."""
    torch.manual_seed(0)
    model = adaskip.attach(toys.make("llama").model, adaskip.RouterConfig())
    for parameter in model.policy.parameters():
        torch.nn.init.normal_(parameter)
    collate = Collator(chatty())
    one, two = collate([{"messages": TWO[:3]}]), collate([{"messages": TWO}])
    keeps = []
    for batch in (one, two):
        model(**batch.arguments())
        keeps.append(model.routing.keep)
    assert torch.equal(*keeps)
    assert two.supervised.sum() == one.supervised.sum() + 3
    labels = {**two.inputs, "labels": two.labels, "use_cache": False}  # without a mask the first label ends the prompt
    model(**labels)
    assert torch.equal(model.routing.keep, keeps[0])


THINKS = CHAT.replace(
    "{% if turn.content is string %}",
    "{% if turn.role == 'assistant' and loop.last %} w60{% endif %}{% if turn.content is string %}",
)


def test_a_template_that_writes_the_last_turn_otherwise() -> None:
    """Some put empty thoughts before the last answer only, so that no earlier text is a beginning of the whole."""
    words = chatty(template=THINKS)
    assert scored(words, Collator(words)([{"messages": TWO}])) == "w3 </s> w60 w5 w6 </s>"


def test_templates_that_cannot_be_cut() -> None:
    """a prompt nothing leads to, an answer that is changed, and a refusal: each in one sentence with its record."""
    for template, reason in {
        CHAT.replace("} w71{%", "} w71 w60{%"): "what it writes before an answer is not what it asks for one with",
        THINKS.replace("{{ turn.content }}", "{{ turn.content | upper }}"): "does not show an answer as it was written",
        "{{ raise_exception('roles must alternate') }}": r"the messages \(roles must alternate\)",
    }.items():
        with pytest.raises(DataError, match=f"the chat template does not take the messages.*{reason}|{reason}"):
            Collator(chatty(template=template))([{"messages": TWO}])


def test_a_model_without_a_template_says_so_once() -> None:
    """Two hundred records have one fault, which is the model's."""
    with pytest.raises(DataError) as caught:
        Collator(tokenizer()).check([{"messages": TWO}] * 200)
    assert str(caught.value).startswith("messages are written by the model's chat template, and its tokenizer has none")
    assert "\n" not in str(caught.value)


def test_an_end_token_that_is_not_the_tokenizers() -> None:
    """Behind a special token with which a template ends a turn comes no second end; where it writes none, one does."""
    for end, last in (("'<sop>'", "w5 w6 <sop>"), ("''", "w5 w6 </s>")):
        words = chatty(template=CHAT.replace("{{ eos_token }}", f"{{{{ {end} }}}}"))
        assert scored(words, Collator(words)([{"messages": TWO}])).endswith(last)


def picture_chat(of_tokenizer: bool = False) -> Any:
    processor = picture_processor("<s>")
    owner = processor.tokenizer if of_tokenizer else processor
    owner.chat_template = CHAT
    return processor


def asks(*parts: Any, answer: str = "w3", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts]}, {"role": "assistant", "content": answer}], **fields}


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "w1"}


@pytest.mark.parametrize("record", [
    asks({"type": "image", "image": RED}, TEXT, {"type": "image_url", "image_url": {"url": RED}}),
    asks(IMAGE, TEXT, IMAGE, images=[RED, RED]),
    asks(IMAGE, TEXT, {"type": "image", "path": RED}, image=RED),
], ids=["own", "beside", "one of each"])  # fmt: skip
def test_several_pictures(record: dict[str, Any]) -> None:
    """Each picture stands where its part does, in whichever of the usual ways it is given."""
    batch = Collator(picture_chat())([record])
    ids = batch.inputs["input_ids"][0][batch.prompt_mask[0]]
    assert words_of(tokenizer(), ids) == f"<s> w70 {'<image> ' * 4}w1 {'<image> ' * 4}w71"
    assert len(batch.inputs["pixel_values"]) == 2


def test_pictures_that_no_part_places() -> None:
    """A conversation of plain text with a picture beside it: the picture opens the first question."""
    record = {"messages": TWO, "image": RED}
    batch = Collator(picture_chat())([record])
    assert words_of(tokenizer(), batch.inputs["input_ids"][0]).startswith(f"<s> w72 w9 w70 {'<image> ' * 4}w1 w2 w71")
    assert record == {"messages": TWO, "image": RED}  # the user's own is left as it was


def test_a_template_of_the_tokenizer_beside_a_processor() -> None:
    """It writes text alone, so the pictures' places are put into that."""
    batch = Collator(picture_chat(of_tokenizer=True))([asks({"type": "image", "image": RED}, TEXT)])
    assert words_of(tokenizer(), batch.inputs["input_ids"][0]).startswith(f"<s> w70 {'<image> ' * 4}w1 w71 w3")


def test_rows_with_and_without_pictures() -> None:
    """Both sorts in one file, each in batches of its own."""
    rows = [asks(TEXT), asks({"type": "image", "image": RED}, TEXT)] * 3
    found = ["pixel_values" in batch.inputs for batch in loader(rows, Collator(picture_chat()), 2)]
    assert set(found) == {True, False}


def says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(("messages", "fault"), [
    ("w1", " is 'w1' (text); expected a list of turns"),
    ([], " is [] (a list); expected a list of turns"),
    ([7], "[0] is 7 (a number); expected a turn such as"),
    ([says("usr", "w1")], "[0].role is 'usr' (text); expected system | developer | user | assistant | tool; did"),
    ([{"role": "user"}], "[0].content is null; expected text or a list of parts"),
    ([says("user", "")], "[0].content is empty; expected text"),
    ([says("user", ["w1"])], "[0].content is 'w1' (text); expected a part such as"),
    ([says("user", [{"type": "video"}])], "[0].content is a part of type 'video' (text); expected text | image"),
    ([says("user", [{"type": "text", "text": 5}])], '[0].content is 5 (a number); expected text: write "5"'),
    (TWO[:2], " holds no turn of the assistant; expected one to learn from"),
    (TWO[2:], " begins with an answer; expected a turn of the user before it"),
    ([*TWO[:2], says("assistant", " ")], "[2].content is empty; expected text"),
    ([*TWO[:2], says("assistant", [IMAGE])], "[2].content shows a picture in an"),
    ([*TWO[:3], says("user", [IMAGE, TEXT]), TWO[4]], " shows a picture behind the first answer; expected all"),
    ([says("user", [IMAGE, TEXT]), TWO[2]], " holds 1 parts of type image without a picture of their own, and 0"),
], ids=str)  # fmt: skip
def test_a_wrong_conversation_is_named(messages: Any, fault: str) -> None:
    """Each wrong turn ends in one sentence that says which, what arrived and what to write."""
    assert read_messages(messages, [], answers=True)[2][0].startswith(fault)


def test_what_follows_the_last_answer_is_left_out() -> None:
    """A question that nobody answers teaches nothing; catches tokens for nobody, and a fault about its picture."""
    assert read_messages([*TWO, says("user", [IMAGE])], [], answers=True)[1:] == ([], [])
    words = chatty()
    batch = Collator(words)([{"messages": [*TWO, {"role": "user", "content": "w8"}]}])
    assert words_of(words, batch.inputs["input_ids"][0]).endswith("w5 w6 </s>")


def test_prompt_and_answer_as_a_conversation(tmp_path: Path) -> None:
    """`data.chat=true` lets the template write what `prompt` and `answer` say; catches markup that is left out."""
    words = chatty()
    batch = Collator(words)([as_conversation({"prompt": "w1", "answer": "w2"})])
    assert words_of(words, batch.inputs["input_ids"][0]) == "<s> w70 w1 w71 w2 </s>"
    assert Collator(words)([{"prompt": "w1", "answer": "w2"}]).inputs["input_ids"].shape == (1, 3)  # raw
