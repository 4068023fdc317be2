"""`doctor` and `size`: what they say of this machine and of models, before anything runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = [sys.executable, "-m", "lmcache_trio"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("LMCACHE_TRIO_")}


def run(*arguments: str, limits: str = "") -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f'{limits} exec "$@"', "bash", *PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False)


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """Verdict and text by what was looked at."""
    assert done.stderr == ""
    lines = [re.split(r" {2,}| (?=\w)", line, maxsplit=1) for line in done.stdout.splitlines()]
    return {re.split(r" {2,}", rest)[0]: (verdict, re.split(r" {2,}", rest)[1]) for verdict, rest in lines}


def test_a_machine_that_can_run_a_server_is_ok_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    tier = f'tiers=[{{backend="disk", path="{tmp_path}/disk", size="64MiB", slab_size="16MiB"}}]'
    done = run("doctor", "--address", f"unix://{tmp_path}/s/server.sock", "--set", "memory.size=16MiB", tier)
    assert done.returncode == 0, done.stdout
    found = findings(done)
    assert list(found) == ["versions", "kernel", "memory", "socket", "limits", "tier 0", "torch", "cuda"]
    assert {verdict for verdict, _ in found.values()} <= {"ok", "warning"}
    assert found["memory"] == ("ok", "16 MiB fit what this machine and its cgroups allow")
    assert re.search(r"takes \S+ \w+ a second", found["tier 0"][1])
    assert list(tmp_path.rglob("*")) == [tmp_path / "disk"]


@pytest.mark.parametrize(
    ("what", "settings", "words"),
    [
        ("memory", ["memory.size=900TiB"], "give less"),
        ("socket", ["address=unix:///proc/none/server.sock"], "give another address"),
        ("tiers", ['tiers=[{backend="nope"}]'], "no backend is called 'nope'"),
    ],
)
def test_what_would_stop_a_server_is_a_fault_with_the_fix(what: str, settings: list[str], words: str) -> None:
    done = run("doctor", "--set", "memory.size=16MiB", *settings)
    if what == "socket" and os.geteuid() == 0:
        pytest.skip("root may write anywhere, by what the kernel says")
    assert done.returncode == 1
    verdict, said = findings(done)[what]
    assert verdict == "fault"
    assert words in said


def test_few_descriptors_and_a_disk_that_is_too_small_are_told(tmp_path: Path) -> None:
    tier = f'tiers=[{{backend="disk", path="{tmp_path}/disk", size="900TiB"}}]'
    done = run("doctor", "--set", "memory.size=16MiB", tier, limits="ulimit -n 60;")
    found = findings(done)
    assert done.returncode == 1
    assert (found["limits"][0], "ulimit -n" in found["limits"][1]) == ("fault", True)
    assert (found["tier 0"][0], "give a smaller size" in found["tier 0"][1]) == ("warning", True)


def model(tmp_path: Path, architecture: str, **config: Any) -> str:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **config}))
    return str(tmp_path)


QWEN3_8B = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
    "sliding_window": None,
    "use_sliding_window": False,
}
GPT_OSS_20B = {
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "sliding_window": 128,
    "dtype": "bfloat16",
}
DEEPSEEK_V3 = {
    "num_hidden_layers": 61,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
}


def test_a_dense_models_tokens_chunks_and_prompts_are_those_of_the_reference(tmp_path: Path) -> None:
    where = model(tmp_path, "Qwen3ForCausalLM", **QWEN3_8B)
    for named in (where, f"{where}/config.json"):
        done = run("size", named, "--memory", "16GiB")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == (
            "Model    Qwen3ForCausalLM: 36 layers; each keeps 8 KV heads of 128, bfloat16\n"
            "A token  144 KiB\n"
            "A chunk  64 tokens, 9 MiB\n"
            "Memory   16 GiB holds 116,480 tokens: 28 prompts of 4,096 tokens\n"
            "A tier   needs 137.3 GiB for a million tokens\n"
        )


def test_ranks_split_heads_and_fp8_halves_a_token(tmp_path: Path) -> None:
    where = model(tmp_path, "Qwen3ForCausalLM", **QWEN3_8B)
    assert "A token  144 KiB, in 4 shards\n" in run("size", where, "--ranks", "4").stdout
    assert "A token  72 KiB\n" in run("size", where, "--kv-dtype", "fp8").stdout
    assert "A chunk  256 tokens, 36 MiB\n" in run("size", where, "--chunk-tokens", "256").stdout


def test_a_window_shorter_than_a_chunk_is_counted_as_it_is_stored(tmp_path: Path) -> None:
    """12 layers with all tokens of a chunk, and 12 with the last 127 of them, in blocks of 16."""
    where = model(tmp_path, "GptOssForCausalLM", **GPT_OSS_20B)
    done = run("size", where, "--chunk-tokens", "256")
    assert "GptOssForCausalLM: 12 layers, 12 layers with a window of 128;" in done.stdout
    assert f"A chunk  256 tokens, {12 * (256 + 128) * 2 * 8 * 64 * 2 / (1 << 20):.4g} MiB\n" in done.stdout


def test_latent_kv_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    where = model(tmp_path, "DeepseekV3ForCausalLM", **DEEPSEEK_V3)
    one, eight = run("size", where), run("size", where, "--ranks", "8")
    assert one.stdout == eight.stdout
    assert "61 layers; each keeps 576 latent values, bfloat16\n" in one.stdout
    assert f"A token  {61 * 576 * 2 / 1024:.4g} KiB\n" in one.stdout


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("NewForCausalLM", {}, "NewForCausalLM is not known here"),
        ("Qwen3NextForCausalLM", {}, "recurrent states"),
        ("LlamaForCausalLM", {}, "'num_hidden_layers' is missing"),
        ("MistralForCausalLM", QWEN3_8B | {"sliding_window": 4096, "use_sliding_window": True}, "names a window"),
        ("LlamaForCausalLM", QWEN3_8B | {"layer_types": ["other"] * 36}, "layers of other"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(
    architecture: str, config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    done = run("size", model(tmp_path, architecture, **config))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert words in done.stderr


def test_a_model_that_is_not_there_and_a_wrong_flag_are_named(tmp_path: Path) -> None:
    where = model(tmp_path, "Qwen3ForCausalLM", **QWEN3_8B)
    for arguments, words in (
        ([f"{tmp_path}/none"], "No such file"),
        ([where, "--memory", "much"], "--memory"),
        ([where, "--ranks", "0"], "--ranks"),
        ([where, "--chunk-tokens", "100"], "--chunk-tokens"),
    ):
        done = run("size", *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert words in done.stderr
