"""Switching on: flags for the three ways, what they refuse, and that nothing in-tree changes."""

import json
import shlex

import pytest
from vllm.exceptions import VLLMClientError

import era_vllm
from era_vllm.errors import ConfigError, UnsupportedError
from era_vllm.lab import CHECKPOINT
from era_vllm.vllm_plugin.families import FAMILIES
from era_vllm.vllm_plugin.launch import plan
from era_vllm.vllm_plugin.version import check_vllm_version

MODEL = str(CHECKPOINT)


def test_engine_args_switch_pruning_on():
    assert era_vllm.engine_args(MODEL, pruning_rate=0.5, policy="dpp", merge=False) == {
        "model": MODEL,
        "hf_overrides": {"architectures": ["EraLlavaForConditionalGeneration"]},
        "tokenizer_mode": "era",
        "additional_config": {"era": {"pruning_rate": 0.5, "policy": "dpp", "merge": False}},
    }


def test_maximum_rate_0_gives_no_argument_at_all():
    assert era_vllm.engine_args(MODEL, max_pruning_rate=0.0) == {"model": MODEL}


def test_the_users_own_overrides_are_kept():
    launch = plan(MODEL, {}, hf_overrides={"a": 1}, additional_config={"b": 2})
    assert launch.engine["hf_overrides"]["a"] == 1
    assert launch.engine["additional_config"]["b"] == 2


def test_command_is_a_shell_line_of_the_same_flags(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    launch = plan(MODEL, {"pruning_rate": 0.889})
    words = shlex.split(launch.command([MODEL, "--port", "9"]))
    assert words[:3] == ["VLLM_PLUGINS=lora_filesystem_resolver,era", "vllm", "serve"]
    assert json.loads(words[words.index("--additional-config") + 1])["era"]["pruning_rate"] == 0.889
    with pytest.raises(ConfigError, match="leaves out 'era'"):
        era_vllm.engine_args(MODEL)


@pytest.mark.parametrize(
    ("settings", "extra", "message"),
    [
        ({"prunning_rate": 0.5}, {}, "did you mean 'pruning_rate'"),
        ({"pruning_rate": 1.0}, {}, r"got 1\.0, allowed: \[0, 0\.95\]"),
        ({"policy": "eras"}, {}, "did you mean 'era'"),
        ({"policy_options": {"mass_scal": 1}}, {}, "did you mean 'mass_scale'"),
        ({}, {"hf_overrides": {"architectures": ["X"]}}, "chooses the architecture"),
        ({}, {"additional_config": {"era": {}}}, "drop one of the two"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_settings_refuse_before_anything_starts(settings, extra, message):
    with pytest.raises(ConfigError, match=message):
        plan(MODEL, settings, **extra)


def test_unserved_family_refuses(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(UnsupportedError, match="got Qwen3ForCausalLM, allowed: Llava"):
        plan(str(tmp_path), {})


def test_no_checkpoint_refuses(tmp_path):
    with pytest.raises(ConfigError, match="needed a"):
        plan(str(tmp_path / "nothing"), {})


def test_untested_vllm_refuses_and_can_be_allowed(monkeypatch, caplog):
    with pytest.raises(UnsupportedError, match=r"got vLLM 0\.33\.1, tested with 0\.32\.x"):
        check_vllm_version("0.33.1")
    monkeypatch.setenv("ERA_ALLOW_UNTESTED_VLLM", "1")
    check_vllm_version("0.33.1")
    assert "0.33.1" in caplog.text


def test_registering_twice_overrides_nothing_in_tree():
    from vllm.model_executor.models.registry import ModelRegistry

    before = dict(ModelRegistry.models)
    era_vllm.register()
    era_vllm.register()
    assert {f"Era{name}" for name in FAMILIES} <= set(ModelRegistry.get_supported_archs())
    for name in FAMILIES:
        assert ModelRegistry.models[name] is before[name]
        assert "era_vllm" not in repr(ModelRegistry.models[name])


def test_untested_vllm_does_not_break_a_stock_process(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    era_vllm.register()
    with pytest.raises(UnsupportedError):
        plan(MODEL, {})


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism 2"),
        ({"enable_mm_embeds": True}, "--enable-mm-embeds"),
        ({"additional_config": {"era": {"pruning_rat": 1}}}, "did you mean 'pruning_rate'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_work_refuses_while_the_engine_is_configured(engine, setup, llm, message):
    with pytest.raises(Exception, match=message):
        engine(setup(llm=llm))


def test_settings_are_in_every_images_identity(engine, setup, ask, images):
    live = engine(setup())
    explicit, default = (
        hashes(live, ask("what shape is red?", images[5], rate=rate)) for rate in (0.778, None)
    )
    assert explicit == default
    assert hashes(live, ask("?", images[5], rate=0.5)) != default
    assert hashes(engine(setup(policy="dpp")), ask("?", images[5])) != default
    pair = hashes(live, ask("?", images[4], images[5], rate=(0.5, 0.778)))
    assert pair[1:] == default
    swapped = hashes(live, ask("?", images[5], images[4], rate=(0.778, 0.5)))
    assert swapped == pair[::-1]


def hashes(engine, request):
    """The multimodal hashes that vLLM's renderer gives a request's images."""
    (rendered,) = engine.llm.llm_engine.renderer.render_cmpl([engine_prompt(engine, request)])
    return rendered["mm_hashes"]["image"]


def engine_prompt(engine, request):
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    return parse_model_prompt(engine.llm.llm_engine.model_config, request.prompt())


@pytest.mark.parametrize("rate", [-0.1, 0.96, "half", [0.5, 0.5], float("nan")], ids=str)
def test_bad_rate_of_a_prompt_refuses_and_the_engine_goes_on(engine, setup, ask, images, rate):
    live = engine(setup())
    with pytest.raises(VLLMClientError, match="needed one an image|allowed: a number in"):
        live.ask([ask("what shape is red?", images[0], rate=rate)])
    (answer,) = live.ask([ask("what shape is red?", images[0])])
    assert answer.text
