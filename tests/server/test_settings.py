"""Options: flags, variables, help, and one sentence for a wrong one."""

from __future__ import annotations

import pytest

from medusa_core.config import EngineConfig
from medusa_core.errors import ConfigError
from server import main
from server.keys import digest_of
from server.settings import ServerSettings, load_settings


def test_defaults_are_the_engines_own():
    assert load_settings([]).engine_config() == EngineConfig()


def test_flags_reach_the_engine():
    flags = {
        "--model": "org/m",
        "--heads": "org/h",
        "--revision": "r",
        "--heads-revision": "h",
        "--dtype": "float32",
        "--device": "cpu",
        "--max-model-len": "99",
        "--block-size": "8",
        "--num-blocks": "7",
        "--memory-fraction": "0.5",
        "--max-num-seqs": "2000",
        "--max-step-tokens": "64",
        "--max-queued-requests": "5",
        "--max-steps-in-flight": "1",
        "--tree": "chain",
        "--tree-size": "16",
    }
    switches = ["--trust-remote-code", "--no-prefix-cache", "--no-speculation", "--no-prompt-lookup"]
    config = load_settings([*(part for flag in flags.items() for part in flag), *switches]).engine_config()
    model, cache, scheduler = config.model, config.cache, config.scheduler
    assert (model.model, model.heads, model.dtype, model.device, model.max_model_len) == ("org/m", "org/h", "float32", "cpu", 99)
    assert (model.revision, model.heads_revision, model.trust_remote_code) == ("r", "h", True)
    assert (cache.block_size, cache.num_blocks, cache.memory_fraction, cache.enable_prefix_cache) == (8, 7, 0.5, False)
    assert (scheduler.max_num_seqs, scheduler.max_step_tokens) == (2000, 64)
    assert (scheduler.max_queued_requests, scheduler.max_steps_in_flight) == (5, 1)
    speculation = config.speculation
    assert (speculation.tree, speculation.tree_size, speculation.enabled, speculation.prompt_lookup) == ("chain", 16, False, False)
    assert load_settings([]).engine_config().speculation.prompt_lookup


def test_several_values_at_once_or_repeated():
    settings = load_settings(["--served-model-name", "a", "b", "--api-key", "k,1", "--api-key", "k2", "--cors-origin", "*"])
    assert settings.served_model_name == ("a", "b")
    assert [entry.rpartition("=")[2] for entry in settings.api_key] == [f"sha256:{digest_of(key).hex()}" for key in (b"k,1", b"k2")]


def test_variables_are_read_and_flags_win(monkeypatch):
    monkeypatch.setenv("MEDUSA_PORT", "9001")
    monkeypatch.setenv("MEDUSA_API_KEY", "one, two")
    monkeypatch.setenv("MEDUSA_NO_SPECULATION", "true")
    settings = load_settings([])
    assert (settings.port, len(settings.api_key), settings.no_speculation) == (9001, 2, True)
    assert load_settings(["--port", "9002"]).port == 9002


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["--port", "many"], "--port"),
        (["--port", "70000"], "--port"),
        (["--dtype", "int3"], "--dtype"),
        (["--tree-size", "huge"], "--tree-size"),
        (["--tree-size", "99"], "tree_size"),
        (["--block-size", "0"], "block_size"),
        (["--memory-fraction", "nan"], "memory_fraction"),
        (["--drain-timeout-s", "-1"], "--drain-timeout-s"),
        (["--host", "256.1.1.1"], "256.1.1.1"),
        (["--api-key", "good", ""], "--api-key"),
        (["--served-model-name", " "], "--served-model-name"),
        (["--host", ""], "--host"),
        (["--isolate-keys"], "--isolate-keys"),
        *(
            ([flag, number], flag)
            for flag in ("--drain-timeout-s", "--receive-timeout-s", "--sse-ping-s")
            for number in ("inf", "nan")
        ),
    ],
)
def test_wrong_values_end_with_code_2_and_one_sentence(arguments, mention, capsys):
    assert main.run(arguments) == 2
    stderr = capsys.readouterr().err
    assert mention in stderr
    assert stderr.count("\n") == 1


def test_wrong_keys_are_told_once_before_any_front_end_starts(tmp_path, capsys):
    arguments = ["--api-workers", "2", "--port", "0", "--api-key-file", str(tmp_path / "none.toml")]
    assert main.run(arguments) == main.EXIT_USAGE
    stderr = capsys.readouterr().err
    assert stderr.count("--api-key-file") == 1
    assert "Listening" not in stderr


def test_a_refused_key_is_not_shown(capsys):
    main.run(["--api-key", "secret", ""])
    assert "secret" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--prot", "1"], ["--port"], ["stray"]])
def test_unknown_flags_end_with_code_2_and_one_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main.run(arguments)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_wrong_variable_is_named(monkeypatch):
    monkeypatch.setenv("MEDUSA_MAX_NUM_SEQS", "x")
    with pytest.raises(ConfigError, match="MEDUSA_MAX_NUM_SEQS"):
        load_settings([])


@pytest.mark.parametrize("value", ["", " ", " , "])
@pytest.mark.parametrize("name", ["API_KEY", "CORS_ORIGIN", "SERVED_MODEL_NAME"])
def test_a_variable_without_a_value_is_refused_and_does_not_open_the_server(monkeypatch, name, value):
    monkeypatch.setenv(f"MEDUSA_{name}", value)
    with pytest.raises(ConfigError, match=f"MEDUSA_{name}"):
        load_settings([])


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as exit_info:
        load_settings(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for name, field in ServerSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description
