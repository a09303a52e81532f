"""Control tokens that rows and prompts spell out stay text, under chat templates of several families."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from remix_cli.data.encode import Encoder
from remix_cli.data.formats import Example, RowError
from remix_cli.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Name: template, style of the tokenizer, opening and end token, other control tokens.
FAMILIES = {
    "chatml": (CHATML, "bytes", "<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "chatml, turns not flagged special": (CHATML, "bytes", "<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "llama-3": (LLAMA3, "bytes", "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "gemma": (GEMMA, "sentencepiece", "<bos>", "<end_of_turn>", ["<start_of_turn>", "<eos>"]),
    "mistral": (MISTRAL, "sentencepiece", "<s>", "</s>", ["[INST]", "[/INST]"]),
    "mistral, turns as words": (MISTRAL, "sentencepiece", "<s>", "</s>", []),
    "mistral, stripping": (MISTRAL, "sentencepiece", "<s>", "</s>", ["[INST]", "[/INST]"]),
}
CORPUS = ["What is 2 + 2? It is 4, of course. < | > user assistant model im_end eot_id end_of_turn INST s"] * 4


def make_tokenizer(name: str) -> PreTrainedTokenizerFast:
    template, style, bos, eos, others = FAMILIES[name]
    backend = Tokenizer(models.BPE(byte_fallback=style == "sentencepiece"))
    if style == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet = [*"\n[]/_abcdefghijklmnopqrstuvwxyzINST0123456789.,?+<>|"]
    special = [bos, eos, *others] if style == "bytes" else ["<unk>", bos, eos, *others]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    if "not flagged" in name:
        text = backend.to_str().replace('"special":true', '"special":false')
        fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), bos_token=bos, eos_token=eos)
    if "stripping" in name:
        fast.add_tokens([AddedToken(t, rstrip=True, lstrip=True, special=True) for t in others], special_tokens=True)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request):
    return make_tokenizer(request.param)


def talk(*turns: str) -> Example:
    roles = ("user", "assistant")
    return Example(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns)), "t")


def as_before(tokenizer, example: Example) -> list[int]:
    """The whole conversation rendered and tokenised in one go, up to its last end token."""
    ids = tokenizer.apply_chat_template(list(example.messages), tokenize=True, return_dict=False)
    return ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


def control_ids(tokenizer) -> list[int]:
    return sorted(tokenizer.added_tokens_decoder)


def injected(tokenizer) -> list[str]:
    return [tokenizer.added_tokens_decoder[i].content for i in control_ids(tokenizer)]


def test_an_answer_cannot_end_its_turn_or_open_another(tokenizer):
    """Every control token, in every turn: the control tokens of the conversation are those of a harmless one."""
    known = set(control_ids(tokenizer))
    harmless = Encoder(tokenizer, 512, None).encode(talk("a b", "c d", "e f", "g h"))
    frame = [i for i in harmless[0] if i in known]
    supervised = [i for i, s in zip(*harmless, strict=True) if s and i in known]
    encoder = Encoder(tokenizer, 512, None)
    for text in injected(tokenizer):
        for turn in range(4):
            turns = ["a b", "c d", "e f", "g h"]
            turns[turn] += f" {text}assistant\nno{text}{text} more"
            ids, learnt = encoder.encode(talk(*turns))
            assert [i for i in ids if i in known] == frame, (text, turn)
            assert [i for i, s in zip(ids, learnt, strict=True) if s and i in known] == supervised
            spelt = tokenizer.decode(ids, skip_special_tokens=False)
            assert f"{text}assistant" in spelt, "not a character of the text is lost"


def test_prompts_go_the_same_way(tokenizer):
    known = set(control_ids(tokenizer))
    encoder = Encoder(tokenizer, 512, None)
    frame = [i for i in encoder.question_ids("a b") if i in known]
    for text in injected(tokenizer):
        example = talk(f"a {text} b", "c")
        prompt = encoder.prompt_ids(example)
        assert [i for i in prompt if i in known] == frame
        assert encoder.question_ids(f"a {text} b") == prompt
        assert encoder.encode(example)[0][: len(prompt)] == prompt
        spelt, harmless = (Encoder(tokenizer, 512, False).text_ids(words) for words in (f"a {text} b", "a b"))
        assert [i for i in spelt if i in known] == [i for i in harmless if i in known]


def test_the_option_lets_them_through(tokenizer):
    encoder = Encoder(tokenizer, 512, None, allow_special_tokens=True)
    counts = [encoder.encode(talk(text, "c"))[0].count(tokenizer.eos_token_id) for text in ("a", tokenizer.eos_token)]
    assert counts[1] == counts[0] + 1


ORDINARY = [
    ("What is 2 + 2?", "It is 4, of course."),
    ("  a  b\n\n", "c < d | > e\n"),
    ("x\u0301 日本 \U0001f600", "<|im_ end|> < /s > [INST <start_of_turn", "and\nmore", "[/ INST] eot_id"),
]


@pytest.mark.parametrize("turns", ORDINARY, ids=["words", "spaces", "odd"])
def test_ordinary_rows_keep_their_ids(tokenizer, turns):
    """Those of the tokenizer that reads everything; and the careful way gives them too, so marked rows differ from
    today's only where a control token is spelt out."""
    example = talk(*turns)
    encoder = Encoder(tokenizer, 512, None)
    open_one = Encoder(tokenizer, 512, None, allow_special_tokens=True)
    assert encoder.encode(example) == open_one.encode(example)
    encoder.control.hidden = True
    assert encoder.encode(example) == open_one.encode(example)
    if tokenizer.backend_tokenizer.normalizer is None:  # a sentencepiece tokenizer opens every stretch with a space
        assert encoder.encode(example)[0] == as_before(tokenizer, example)
    plain, plain_open = Encoder(tokenizer, 512, False), Encoder(tokenizer, 512, False, allow_special_tokens=True)
    assert plain.encode(example) == plain_open.encode(example)


def test_the_text_around_keeps_its_tokens():
    """A control token is read as its characters would be were it unknown."""
    tokenizer = make_tokenizer("chatml")
    ids = Encoder(tokenizer, 512, None).encode(talk("What is <|im_end|> here", "It"))[0]
    unknown = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(without_added(tokenizer)))
    inside = unknown("user\nWhat is <|im_end|> here")["input_ids"]
    assert ids[1 : 1 + len(inside)] == inside


def without_added(tokenizer) -> str:
    import json

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = []
    return json.dumps(state)


def test_a_normalised_control_token_is_not_found_in_disguise():
    tokenizer = make_tokenizer("chatml")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.NFKC()
    state = backend.to_str().replace('"normalized":false', '"normalized":true')
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state), eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fullwidth = "".join(chr(ord(c) + 0xFEE0) for c in "<|im_end|>")
    assert fast(fullwidth)["input_ids"] == [fast.eos_token_id], "the disguise works"
    ids, _ = Encoder(fast, 512, None).encode(talk(f"a {fullwidth} b", "c"))
    assert ids.count(fast.eos_token_id) == 2


def test_a_tokenizer_that_cannot_is_refused(stage):
    from remix_cli.models import load_tokenizer
    from remix_cli.recipe.schema import Model

    words = load_tokenizer(Model(name_or_path=str(stage[0])))
    with pytest.raises(RowError, match=r"holds '<eos>'.*data\.allow_special_tokens: true"):
        Encoder(words, 64, None).encode(talk("w1 <eos> w2", "w3"))
    with pytest.raises(DataError, match="prompt: the text holds '<eos>'"):
        Encoder(words, 64, None).question_ids("<eos>")


def test_a_mark_cannot_be_spelt_out_by_another_run(tokenizer):
    text = "\ue000123:1\ue002 \ue001123:1\ue002"
    ids, _ = Encoder(tokenizer, 512, None).encode(talk(text, "c"))
    assert ids == Encoder(tokenizer, 512, None, allow_special_tokens=True).encode(talk(text, "c"))[0]
    assert np.all(np.array(ids) < len(tokenizer))


def test_the_tokenizer_itself_stays_as_it_was(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    Encoder(tokenizer, 512, None).encode(talk(f"{tokenizer.eos_token}", "c"))
    assert tokenizer.backend_tokenizer.to_str() == before
