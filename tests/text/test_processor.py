"""Loading, encoding and chat rendering, with the errors a user or an operator meets."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

from medusa_core.errors import ConfigError, InvalidParameterError, ModelLoadError
from medusa_core.text import TextProcessor

USER = {"role": "user", "content": "the dog"}


@pytest.fixture(scope="module")
def processor(model_folder) -> TextProcessor:
    return TextProcessor.load(model_folder)


def rendered(processor: TextProcessor, messages: list, **options) -> str:
    return processor.decode(processor.render_chat(messages, **options), skip_special_tokens=False)


def test_encoding_is_the_tokenizers_own(processor, model_folder):
    reference = AutoTokenizer.from_pretrained(model_folder)
    assert processor.encode("the dog 😀") == reference.encode("the dog 😀")
    assert processor.encode("the dog", add_special_tokens=False) == reference.encode("the dog", add_special_tokens=False)


def test_a_truncating_tokenizer_file_does_not_shorten_prompts(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.save_pretrained(tmp_path)
    assert len(TextProcessor.load(tmp_path).encode("the quick brown fox jumps over the dog")) > 3


def test_long_texts_can_be_encoded_in_threads_at_once(processor):
    texts = [f"the dog {i} " * 500 for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(processor.encode, texts)) == [processor.encode(text) for text in texts]


def test_half_a_surrogate_pair_is_refused(processor):
    with pytest.raises(InvalidParameterError, match="surrogate") as caught:
        processor.encode("a\ud83d")
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidParameterError, match="surrogate") as caught:
        processor.render_chat([{"role": "user", "content": "\ud83d"}])
    assert caught.value.param == "messages"


def test_a_chat_is_rendered_by_the_models_template_with_one_bos(processor, model_folder):
    reference = AutoTokenizer.from_pretrained(model_folder)
    want = reference.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert processor.render_chat([USER]) == list(want)
    assert rendered(processor, [USER]) == "<s><|user|>user: the dog</s><|assistant|>"


def test_the_last_message_can_be_continued(processor):
    messages = [USER, {"role": "assistant", "content": "runs over"}]
    text = rendered(processor, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "<s><|user|>user: the dog</s><|user|>assistant: runs over"
    with pytest.raises(InvalidParameterError, match="exclude each other"):
        processor.render_chat(messages, continue_final_message=True)


def test_text_parts_are_joined_and_other_parts_refused(processor):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}]
    assert processor.render_chat([{"role": "user", "content": parts}]) == processor.render_chat([USER])
    with pytest.raises(InvalidParameterError, match="text parts"):
        processor.render_chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_developer_is_system_unless_the_template_knows_it(processor, model_folder):
    developer = {"role": "developer", "content": "be brief"}
    assert "system: be brief" in rendered(processor, [developer, USER])
    knowing = "{% for m in messages %}{{ 'DEV' if m.role == 'developer' else m.role }}{% endfor %}"
    assert rendered(TextProcessor.load(model_folder, chat_template=knowing), [developer]) == "DEV"


def test_the_templates_own_refusal_reaches_the_user(processor):
    with pytest.raises(InvalidParameterError, match="unknown role wizard") as caught:
        processor.render_chat([{"role": "wizard", "content": "x"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("messages", [[{"role": "user"}], [{}], [{"role": "user", "content": {"a": 1}}]])
def test_odd_messages_never_raise_anything_but_a_request_error(model_folder, messages):
    strict = TextProcessor.load(model_folder, chat_template="{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")
    with pytest.raises(InvalidParameterError):
        strict.render_chat(messages)


def test_no_messages_are_refused(processor):
    with pytest.raises(InvalidParameterError, match="at least one"):
        processor.render_chat([])


def test_template_variables_reach_the_template_but_not_the_renderer(model_folder):
    processor = TextProcessor.load(model_folder, chat_template="{{ messages[0].content }}{{ ' loud' if loud else '' }}")
    assert rendered(processor, [USER], template_kwargs={"loud": True}) == "the dog loud"
    with pytest.raises(InvalidParameterError, match="tokenize") as caught:
        processor.render_chat([USER], template_kwargs={"tokenize": True})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{% include '/etc/hostname' %}",
    ],
)
def test_a_hostile_template_gets_at_nothing(model_folder, template):
    """It comes with a model's files, which need not be the operator's own."""
    hostile = TextProcessor.load(model_folder, chat_template=template)
    with pytest.raises(InvalidParameterError):
        hostile.render_chat([USER])


@pytest.mark.parametrize("variables", [{"raise_exception": "x"}, {"range": [1]}, {"strftime_now": None}, {"loud": 10**9}])
def test_template_variables_are_data(model_folder, variables):
    template = "{{ strftime_now('%Y') }}{% for i in range(loud) %}{% endfor %}{{ raise_exception('no') }}"
    with pytest.raises(InvalidParameterError):
        TextProcessor.load(model_folder, chat_template=template).render_chat([USER], template_kwargs={"loud": 1} | variables)


def test_a_model_without_template_names_the_remedy(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InvalidParameterError, match="--chat-template"):
        TextProcessor.load(tmp_path).render_chat([USER])
    replaced = TextProcessor.load(tmp_path, chat_template="{{ messages[0].content }}")
    assert rendered(replaced, [USER]) == "the dog"


def test_the_template_option_takes_a_file(model_folder, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("I say: {{ messages[0].content }}")
    assert rendered(TextProcessor.load(model_folder, chat_template=str(file)), [USER]) == "I say: the dog"


@pytest.mark.parametrize("template", ["no-such-file.jinja", "{% if %}", "{{ messages"])
def test_an_unusable_template_option_is_a_configuration_error(model_folder, template):
    with pytest.raises(ConfigError, match="--chat-template"):
        TextProcessor.load(model_folder, chat_template=template)


BAD_SCHEMA = '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": 3}}'


@pytest.mark.parametrize("content", ["{ truncated", "[]", "{}", BAD_SCHEMA])
def test_a_malformed_tokenizer_file_is_a_load_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelLoadError, match="No tokenizer could be loaded"):
        TextProcessor.load(tmp_path)


def test_a_folder_without_tokenizer_is_a_load_error(tmp_path):
    with pytest.raises(ModelLoadError, match="tokenizer"):
        TextProcessor.load(tmp_path)
    with pytest.raises(ModelLoadError, match="does not exist"):
        TextProcessor.load(tmp_path / "missing")


def test_importing_the_package_does_not_import_torch():
    code = "import sys, medusa_core.text; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tokens_as_strings_and_the_tokenizers_configuration(processor, model_folder):
    reference = AutoTokenizer.from_pretrained(model_folder)
    token_ids = processor.encode("the dog")
    assert processor.token_strings(token_ids) == reference.convert_ids_to_tokens(token_ids)
    assert processor.token_strings([10**6]) == [""]
    info = processor.tokenizer_info()
    assert info["eos_token"] == reference.eos_token
    assert info["chat_template"] == reference.chat_template
    assert info["eos_token"] not in info["additional_special_tokens"]
    named = {info[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    assert {*info["additional_special_tokens"], *(named - {None})} == set(reference.all_special_tokens)
    assert info["tokenizer_class"] == type(reference).__name__
    other = TextProcessor.load(model_folder, chat_template="{{ messages[0].content }}")
    assert other.tokenizer_info()["chat_template"] == "{{ messages[0].content }}"


def test_values_nested_too_deeply_for_the_template_are_refused(model_folder):
    processor = TextProcessor.load(model_folder, chat_template="{{ messages[0].content }}{{ tools | tojson }}")
    nested = {}
    for _ in range(900):
        nested = {"a": nested}
    with pytest.raises(InvalidParameterError, match="recursion"):
        processor.render_chat([USER], template_kwargs={"tools": [nested]})


def test_the_templates_text_is_all_that_may_be_rendered(processor, model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert processor.chat_template_text == tokenizer.chat_template
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "two")
    assert "tools" in TextProcessor.load(tmp_path / "two").chat_template_text
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "none")
    assert TextProcessor.load(tmp_path / "none").chat_template_text == ""
