"""Switching on: flags for the three ways, what they refuse, and that nothing in-tree changes."""

import copy
import json
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.exceptions import VLLMClientError

import era_vllm
from era_vllm.cli.doctor.findings import engine_config
from era_vllm.cli.doctor.findings import model as models_findings
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError, UnsupportedError
from era_vllm.lab import CHECKPOINT
from era_vllm.layout import one_grid
from era_vllm.plan import plan as plan_of
from era_vllm.vllm_plugin import processor
from era_vllm.vllm_plugin.build import build
from era_vllm.vllm_plugin.cache_keys import namespace, pruned_hashes
from era_vllm.vllm_plugin.families import FAMILIES
from era_vllm.vllm_plugin.launch import plan
from era_vllm.vllm_plugin.refusals import REFUSALS, refuse
from era_vllm.vllm_plugin.version import check_vllm_version

MODEL = str(CHECKPOINT)
IMAGE_TOKEN = 4
LLAVA = FAMILIES["LlavaForConditionalGeneration"]


def test_engine_args_switch_pruning_on():
    assert era_vllm.engine_args(MODEL, pruning_rate=0.5, policy="dpp", merge=False) == {
        "model": MODEL,
        "hf_overrides": {"architectures": ["EraLlavaForConditionalGeneration"]},
        "tokenizer_mode": "era",
        "additional_config": {"era": {"pruning_rate": 0.5, "policy": "dpp", "merge": False}},
    }


def test_a_path_is_as_good_as_its_name():
    assert era_vllm.engine_args(CHECKPOINT) == era_vllm.engine_args(MODEL)


def test_a_plugin_list_with_spaces_is_told_as_vllm_reads_it(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "foo, era")
    assert plan(MODEL, {}).environment == {"VLLM_PLUGINS": "foo,era"}
    with pytest.raises(ConfigError, match=r"spaces as part of a name\); set VLLM_PLUGINS=foo,era "):
        era_vllm.engine_args(MODEL)


def test_maximum_rate_0_gives_no_argument_at_all():
    assert era_vllm.engine_args(MODEL, max_pruning_rate=0.0) == {"model": MODEL}


def test_the_users_own_overrides_are_kept():
    launch = plan(MODEL, {}, hf_overrides={"a": 1}, additional_config={"b": 2})
    assert launch.engine["hf_overrides"]["a"] == 1
    assert launch.engine["additional_config"]["b"] == 2


def test_command_is_a_shell_line_of_the_same_flags(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    launch = plan(MODEL, {"pruning_rate": 0.889})
    words = shlex.split(launch.command(launch.arguments([MODEL, "--port", "9"])))
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
        ({"policy": "era", "policy_options": {"mass_scal": 1}}, {}, "did you mean 'mass_scale'"),
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
    with pytest.raises(ConfigError, match="got an empty name"):
        plan("", {})


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


def test_another_packages_row_for_a_family_of_ours_does_not_switch_us_off(monkeypatch):
    """Its plugin may be loaded first."""
    from vllm.renderers.registry import RENDERER_REGISTRY

    from era_vllm.vllm_plugin.register import register_family

    era_vllm.register()
    monkeypatch.delitem(RENDERER_REGISTRY.renderers, "era")
    name, family = next(iter(FAMILIES.items()))
    register_family(name, family)
    era_vllm.register()
    assert "era" in RENDERER_REGISTRY.renderers


def test_a_family_of_more_than_pictures_and_videos_is_refused():
    """Its rates would be dropped on the way."""
    from era_vllm.vllm_plugin.families import Family
    from era_vllm.vllm_plugin.register import register_family

    with pytest.raises(UnsupportedError, match="got modalities image, audio, allowed: image"):
        register_family("Some", Family("some:Class", ("image", "audio")))
    assert "Some" not in FAMILIES


def test_untested_vllm_does_not_break_a_stock_process(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    era_vllm.register()
    with pytest.raises(UnsupportedError):
        plan(MODEL, {})


def renderer_registry(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.renderers.registry", None)


def models_config_map(monkeypatch):
    monkeypatch.delattr("vllm.model_executor.models.config.MODELS_CONFIG_MAP")
    monkeypatch.delattr("era_vllm.compat.models_config_map")
    monkeypatch.delitem(sys.modules, "era_vllm.compat.models_config_map")


def renderer_modes(monkeypatch):
    monkeypatch.delattr("vllm.renderers.registry.RENDERER_REGISTRY.renderers")


@pytest.mark.parametrize("moved", [renderer_registry, models_config_map, renderer_modes])
def test_a_vllm_whose_parts_have_moved_goes_on_without_us(monkeypatch, caplog, moved):
    era_vllm.register()
    moved(monkeypatch)
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    era_vllm.register()
    assert "made for vLLM 0.32.x, found 0.33.0" in caplog.text


def test_without_vllm_the_way_to_install_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UnsupportedError, match=r"'era-vllm\[cpu\]' with PyTorch's CPU index"):
        era_vllm.engine_args(MODEL)


WANTED = {
    "pipeline parallelism": {"parallel_config.pipeline_parallel_size": 2},
    "prefill context parallelism": {"parallel_config.prefill_context_parallel_size": 2},
    "decode context parallelism": {"parallel_config.decode_context_parallel_size": 2},
    "micro-batches": {"parallel_config.ubatch_size": 2},
    "speculative decoding": {"speculative_config": SimpleNamespace(method="eagle")},
    "encoder CUDA graphs": {"compilation_config.cudagraph_mm_encoder": True},
    "a compiled encoder": {"compilation_config.compile_mm_encoder": True},
    "encoders that share out": {
        "model_config.multimodal_config.mm_encoder_tp_mode": "data",
        "model_config.hf_config.era": EraConfig(policy="era").as_dict(),
    },
    "vLLM's own pruning": {"model_config.multimodal_config.video_pruning_rate": 0.5},
    "layers without": {
        "model_config._model_info": SimpleNamespace(is_hybrid=True, is_attention_free=False)
    },
    "given embeddings": {"model_config.multimodal_config.enable_mm_embeds": True},
    "prompt embeddings": {"model_config.enable_prompt_embeds": True},
    "LoRA adapters of": {"lora_config": SimpleNamespace(enable_tower_connector_lora=True)},
    "LoRA adapters (--enable-lora) with a policy": {
        "lora_config": SimpleNamespace(enable_tower_connector_lora=False),
        "model_config.hf_config.era": EraConfig(policy="entropyprune").as_dict(),
    },
    "LoRA adapters (--enable-lora) with a scout": {
        "lora_config": SimpleNamespace(enable_tower_connector_lora=False),
        "model_config.hf_config.era": EraConfig(scout=1).as_dict(),
    },
    "an fp8 KV cache with": {
        "cache_config.cache_dtype": "fp8",
        "model_config.dtype": torch.bfloat16,
        "model_config.hf_config.era": EraConfig(policy="era", bias_store="value_column").as_dict(),
    },
    "other numbers in": {"cache_config.cache_dtype": "fp8_e5m2"},
    "an encoder without": {"model_config.multimodal_config.mm_encoder_only": True},
}


@pytest.fixture(scope="module")
def pruning_config():
    """The config of an engine that prunes, as vLLM builds it."""
    return engine_config(era_vllm.engine_args(MODEL))


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.feature)
def test_each_refusal_is_told_with_what_works(pruning_config, row, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    values, *more = (change for name, change in WANTED.items() if row.feature.startswith(name))
    assert not more
    refuse(pruning_config)
    with pytest.raises(UnsupportedError) as refused:
        refuse(changed(pruning_config, values))
    assert (
        str(refused.value) == f"era_vllm cannot prune with {row.feature}: {row.why}; {row.instead}"
    )


def test_doctor_refuses_an_encoder_layer_before_the_engine_does(pruning_config):
    models_findings(pruning_config, EraConfig(attention_layer=4))
    with pytest.raises(UnsupportedError, match="got 5, allowed: 1 to 4 or -5 to -2"):
        models_findings(pruning_config, EraConfig(attention_layer=5))


def test_all_refusals_are_told_at_once(pruning_config, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    other = "LoRA adapters ("  # of a policy that reads no encoder
    of_one_policy = [values for name, values in WANTED.items() if not name.startswith(other)]
    wanted = {path: value for values in of_one_policy for path, value in values.items()}
    with pytest.raises(UnsupportedError) as refused:
        refuse(changed(pruning_config, wanted))
    rows = [row for row in REFUSALS if not row.feature.startswith(other)]
    assert all(f"{row.feature}: {row.why}" in str(refused.value) for row in rows)


def changed(config, values):
    """A copy of vLLM's config with some fields set, as where a platform allows them."""
    config = copy.copy(config)
    for path, value in values.items():
        *parents, field = path.split(".")
        part = config
        for name in parents:
            setattr(part, name, copy.copy(getattr(part, name)))
            part = getattr(part, name)
        setattr(part, field, value)
    return config


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"enable_mm_embeds": True}, "--enable-mm-embeds"),
        ({"mm_encoder_only": True}, "--mm-encoder-only"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"compilation_config": {"compile_mm_encoder": True}}, "compile_mm_encoder"),
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype"),
        ({"enable_lora": True, "enable_tower_connector_lora": True}, "vision tower"),
        ({"additional_config": {"era": {"pruning_rat": 1}}}, "did you mean 'pruning_rate'"),
        ({"mm_processor_kwargs": {"era": 0.5}}, r"default rate with pruning_rate \(engine_args"),
        ({"mm_processor_kwargs": {"Era": 0.5}}, "got 'Era', needed 'era'"),
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


def test_our_version_is_in_every_images_identity(monkeypatch):
    def salted():
        build.cache_clear()
        plans = [plan_of(one_grid(12, 12, ()), 0.5, EraConfig())]
        return pruned_hashes(["a"], plans, EraConfig(), LLAVA, "sha256", "image")

    before = salted()
    assert salted() == before
    monkeypatch.setattr("era_vllm.__version__", "0.0.0")
    assert salted() != before
    monkeypatch.undo()
    assert salted() == before


def test_rates_that_keep_the_same_number_share_everything(engine, setup, ask, images):
    """So that a default that moves a little (with the load) keeps its caches."""
    live = engine(setup())
    near = [ask("what shape is red?", images[8], rate=rate) for rate in (0.05, 0.0503, 0.04)]
    same, also, other = (hashes(live, request) for request in near)
    assert same == also != other
    live.ask(near[:1])
    encoded = live.encoded
    (answer,) = live.ask(near[1:2])
    assert live.encoded == encoded and answer.cached_tokens > 0


def test_every_prompt_is_in_a_namespace_of_our_settings(engine, setup, ask, images):
    """Also one of text, whose blocks have another layout than a stock engine's."""
    live = engine(setup())
    (text,) = rendered_by(live, {"prompt": "USER: hello ASSISTANT:"})
    (own,) = rendered_by(live, {"prompt": "USER: hello ASSISTANT:", "cache_salt": "mine"})
    (picture,) = rendered_by(live, ask("?", images[0]).prompt())
    (other,) = rendered_by(engine(setup(policy="dpp")), {"prompt": "USER: hello ASSISTANT:"})
    ours = namespace(EraConfig(policy="era"), LLAVA)
    assert ours.startswith(f"era {era_vllm.__version__} ")
    assert [one["cache_salt"] for one in (text, own, picture)] == [ours, f"{ours} mine", ours]
    assert other["cache_salt"] != ours
    long = ask("how many shapes? " * 60)
    assert [live.ask([long])[0].cached_tokens > 100 for _ in range(2)] == [False, True]
    (salted,) = live.llm.generate({**long.prompt(), "cache_salt": "mine"}, use_tqdm=False)
    assert not salted.num_cached_tokens


def test_details_count_offline_too(engine, setup, images):
    live = engine(setup())
    parts = [{"type": "image_pil", "image_pil": image} for image in images[:3]]
    parts[0]["detail"], parts[1]["detail"] = "high", "low"
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]
    (chat,) = live.llm.chat(messages, use_tqdm=False)
    assert chat.prompt_token_ids.count(IMAGE_TOKEN) == 144 + 16 + 32
    parts[0]["era"] = {"level": "extreme"}
    (chat,) = live.llm.chat(messages, use_tqdm=False)
    assert chat.prompt_token_ids.count(IMAGE_TOKEN) == 8 + 16 + 32
    with pytest.raises(VLLMClientError, match="content.0..era: got it beside mm_processor_kwargs"):
        live.llm.chat(messages, mm_processor_kwargs={"era": 0.5}, use_tqdm=False)
    parts[0]["era"] = {"pruning_rate": 1}
    with pytest.raises(VLLMClientError, match="content.0..era.pruning_rate: got 1, allowed"):
        live.llm.chat(messages, use_tqdm=False)
    del parts[0]["era"]
    by_rate = live.llm.chat(messages, mm_processor_kwargs={"era": [0.5, 0.5, 0]}, use_tqdm=False)
    assert by_rate[0].prompt_token_ids.count(IMAGE_TOKEN) == 72 + 72 + 144


def test_a_name_of_a_picture_needs_the_picture_too(engine, setup, ask, images):
    live = engine(setup())
    named = {**ask("?", images[0]).prompt(), "multi_modal_uuids": {"image": ["cat"]}}
    renamed = {**named, "multi_modal_data": {"image": [images[1]]}}
    found = [rendered_by(live, prompt)[0]["mm_hashes"]["image"] for prompt in (named, renamed)]
    assert found[0] == found[1] != hashes(live, ask("?", images[0]))
    with pytest.raises(VLLMClientError, match="send the picture beside it"):
        rendered_by(live, {**named, "multi_modal_data": {"image": [None]}})


def test_an_array_of_pictures_is_one_request_of_several(engine, setup, ask, images):
    live = engine(setup())
    pair = [np.asarray(image.convert("RGB")) for image in images[:2]]
    request = ask("?", *images[:2], rate=(0.5, 0.778)).prompt()
    for value in (pair, np.stack(pair)):
        (rendered,) = rendered_by(live, {**request, "multi_modal_data": {"image": value}})
        lengths = [place.length for place in rendered["mm_placeholders"]["image"]]
        assert lengths == [72, 32]
    one = ask("?", images[0], rate=0.5).prompt()
    (rendered,) = rendered_by(live, {**one, "multi_modal_data": {"image": pair[0]}})
    assert len(rendered["mm_placeholders"]["image"]) == 1


def test_a_callers_prompt_is_left_as_it_was(engine, setup, images):
    live = engine(setup())
    ids = live.llm.get_tokenizer()("USER: <image> ? ASSISTANT:")["input_ids"]
    prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": [images[0]]}}
    before = dict(prompt)
    assert len(rendered_by(live, prompt)[0]["prompt_token_ids"]) > 32
    assert prompt == before


def test_rates_are_worked_out_once_a_prompt(engine, setup, ask, images, monkeypatch):
    live, calls, stock = engine(setup()), [], processor.effective_rates
    monkeypatch.setattr(
        processor, "effective_rates", lambda *args: calls.append(args) or stock(*args)
    )
    counts = []
    for count in (1, 4):
        calls.clear()
        hashes(live, ask(f"{count}?", *images[6 : 6 + count], rate=0.6))
        counts.append(len(calls))
    assert counts == [1, 1]
    info = live.llm.llm_engine.renderer.mm_processor.info
    assert info.era is info.era


def hashes(engine, request):
    """The multimodal hashes that vLLM's renderer gives a request's images."""
    return rendered_by(engine, request.prompt())[0]["mm_hashes"]["image"]


def rendered_by(engine, prompt):
    """What an engine's renderer makes of a prompt."""
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    live = engine.llm.llm_engine
    prompts = [parse_model_prompt(live.model_config, prompt)]
    return live.renderer.render_cmpl(prompts, skip_mm_cache=True)  # the engine never sees them


@pytest.mark.parametrize("rate", [-0.1, 0.96, "half", [0.5, 0.5], float("nan")], ids=str)
def test_bad_rate_of_a_prompt_refuses_and_the_engine_goes_on(engine, setup, ask, images, rate):
    live = engine(setup())
    with pytest.raises(VLLMClientError, match="needed one for each|allowed: a number in"):
        live.ask([ask("what shape is red?", images[0], rate=rate)])
    (answer,) = live.ask([ask("what shape is red?", images[0])])
    assert answer.text
