"""The arithmetic of predicted scaling: work by hand and by torch's own count, messages, memory, layouts and advice."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MambaConfig

from deepspeed_inference.benchmarks.scaling.advice import advise
from deepspeed_inference.benchmarks.scaling.assumptions import LIKELY
from deepspeed_inference.benchmarks.scaling.hardware import DEVICES, LINKS, Cluster, cluster_named
from deepspeed_inference.benchmarks.scaling.latency import Messages
from deepspeed_inference.benchmarks.scaling.memory import ONE_PIECE, STATES_OF_ALL_TOKENS, Memory
from deepspeed_inference.benchmarks.scaling.models import Model, model_named
from deepspeed_inference.benchmarks.scaling.prediction import MODELLED, Setting, predict
from deepspeed_inference.benchmarks.scaling.rates import MESSAGES, PRODUCTS, Rates
from deepspeed_inference.benchmarks.scaling.work import Load, Operation, head_work, layers_work
from megatron_ssm.families import families
from megatron_ssm.families.communication import Collective
from ssm_kernels.codecs import CODECS

MODELS = ("mamba-2.8B", "falcon_mamba-7B", "zamba-7B", "mamba2-2.7B")


def _tiny(**options) -> Model:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "vocab_size": 64, "state_size": 4, "time_step_rank": 2}
    config = MambaConfig(**{**sizes, **options})
    return Model("tiny", config, families()["mamba"])


def _setting(words: str = "1xA100", model: str = "mamba-2.8B", **options) -> Setting:
    links = {name: options.pop(name) for name in ("within", "between") if name in options}
    return Setting(model=model_named(model), cluster=cluster_named(words, **links), **options)


# Work.


def test_products_are_two_flop_a_parameter_and_token():
    """D 16, I 32, R 2, N 4: in_proj 64·16, x_proj 10·32, dt_proj 32·2, out_proj 16·32 in each of three layers."""
    parameters = 3 * (64 * 16 + 10 * 32 + 32 * 2 + 16 * 32)
    for ranks, share in ((1, 1.0), (2, 0.5)):
        work = layers_work(_tiny().plan, ranks, Load(tokens=5, sequences=1))
        assert sum(operation.flops for operation in work) == 2 * 5 * parameters * share
        products = [operation for operation in work if operation.flops]
        assert sum(operation.weight_bytes for operation in products) == 2 * parameters * share


def test_products_are_those_that_torch_counts():
    model, tokens = _tiny(), 6
    theirs = AutoModelForCausalLM.from_config(model.config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(torch.zeros(1, tokens, dtype=torch.int64))
    products = sum(
        count
        for operator, count in counter.get_flop_counts()["Global"].items()
        if operator in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    work = layers_work(model.plan, 1, Load(tokens=tokens, sequences=1))
    head = head_work(model.plan, 1, tokens, torch.bfloat16)
    assert sum(operation.flops for operation in [*work, head]) == products


def test_the_scan_by_hand():
    """An exponential for each number of the state, and four for softplus and silu; the state is read and written."""
    (scan,) = [op for op in layers_work(_tiny().plan, 2, Load(tokens=7, sequences=3)) if op.name == "scan"]
    assert scan.exponentials == 3 * 7 * 16 * (4 + 4)
    assert scan.state_bytes == 3 * 3 * 2 * 16 * 4 * torch.float32.itemsize


@pytest.mark.parametrize("name", MODELS)
def test_ranks_share_the_work(name):
    plan, load = model_named(name).plan, Load(tokens=512, sequences=1, keys=256)
    flops = [sum(operation.flops for operation in layers_work(plan, ranks, load)) for ranks in (1, 2, 4)]
    assert flops[0] > flops[1] > flops[2] >= flops[0] / 4


def test_attention_grows_with_the_context():
    for name, grows in (("zamba-7B", True), ("mamba-2.8B", False)):
        near, far = (
            sum(op.nbytes for op in layers_work(model_named(name).plan, 1, Load(tokens=1, sequences=1, keys=keys)))
            for keys in (100, 200)
        )
        assert (far > near) is grows


# Seconds of work.


def test_a_kernel_takes_as_long_as_its_slowest_side():
    rates = Rates(products=100.0, memory=10.0, exponentials=1.0, launch=0.5)
    one = Operation(name="x", flops=300, weight_bytes=20, exponentials=1)
    assert rates.seconds([one]) == {PRODUCTS: 3.0, "starting kernels": 0.5}
    assert sum(rates.seconds([one, one.times(2)]).values()) == pytest.approx(3 * 3.5)


def test_a_dtype_without_a_rate_is_refused():
    with pytest.raises(
        ValueError, match=r"dtype: expected one of bfloat16, float16, float32 on A6000, found 'float64'"
    ):
        Rates.of(DEVICES["A6000"], LIKELY, "float64")


# Messages.


def test_a_ring_by_hand():
    """LL on NVLink: 6.6 µs, six hops of 0.6, and 1.5 times the bytes at half of 195 GB/s."""
    messages = Messages(cluster_named("4xA100"), 4, LIKELY)
    assert messages.plain(1000) == pytest.approx(6.6e-6 + 6 * 0.6e-6 + 1.5 * 1000 / (0.5 * 195e9))
    assert messages.plain(1e9) == pytest.approx(14e-6 + 6 * 1.9e-6 + 1.5e9 / (120 / 128 * 195e9))


def test_hosts_have_a_ring_in_each_and_one_between():
    pair, hosts = (Messages(cluster_named(words), 2, LIKELY).plain(1e9) for words in ("2xA100", "2x1xA100"))
    both = Messages(cluster_named("2x2xA100"), 4, LIKELY).plain(1e9)
    assert both == pytest.approx(pair + hosts)
    # Where each GPU has a link of its own, two shards travel side by side.
    own, alone = (
        Messages(cluster_named(words, between="infiniband-hdr"), ranks, LIKELY).plain(1e10)
        for words, ranks in (("2x2xA100", 4), ("2x1xA100", 2))
    )
    assert own < alone


def test_one_rank_sends_nothing():
    assert Messages(cluster_named("1xA100"), 1, LIKELY).plain(1e9) == 0
    found = predict(_setting("2xA100", data=2, batch=2))
    assert MESSAGES not in found.prefill and MESSAGES not in found.decode


def test_codecs_send_their_bytes_and_only_where_the_site_bears_it():
    plain, coded = (Messages(cluster_named("2xA6000"), 2, LIKELY, codec) for codec in (None, "int8"))
    tokens = 2048
    large, small = Collective("out_proj", 2560), Collective("x_proj", exact=192)
    assert coded.seconds(small, tokens, torch.bfloat16) == plain.seconds(small, tokens, torch.bfloat16)
    wire = CODECS["int8"].nbytes(2560 * tokens) / (120 / 128 * 24e9)
    found = coded.seconds(large, tokens, torch.bfloat16)
    assert wire < found < plain.seconds(large, tokens, torch.bfloat16)
    one = Collective("out_proj", 2560)
    assert coded.seconds(one, 1, torch.bfloat16) <= plain.seconds(one, 1, torch.bfloat16)
    with pytest.raises(ValueError, match=r"codec: expected one of int8, .* found 'int3'"):
        Messages(cluster_named("2xA6000"), 2, LIKELY, "int3")


def test_ranks_that_leave_a_host_half_full_are_refused():
    with pytest.raises(ValueError, match=r"ranks: expected whole hosts of 4, found 6 ranks"):
        Messages(cluster_named("2x4xA100"), 6, LIKELY)


# Predictions.


def _faster_links(cluster: Cluster) -> Cluster:
    return replace(cluster, within=replace(cluster.within, rate=2 * cluster.within.rate))


@pytest.mark.parametrize("codec", [None, "int8"])
def test_more_of_anything_is_never_slower(codec):
    setting = _setting("4xA6000", tensor=4, prompt=3000, output=8, batch=3, codec=codec)
    seconds = predict(setting).seconds
    device = setting.cluster.device
    assert predict(replace(setting, cluster=_faster_links(setting.cluster))).seconds < seconds
    for name in ("memory_rate", "exponentials"):
        faster = replace(device, **{name: 2 * getattr(device, name)})
        assert predict(replace(setting, cluster=replace(setting.cluster, device=faster))).seconds <= seconds
    assert predict(replace(setting, two_chunks=True)).seconds <= seconds


def test_times_add_up():
    setting = _setting("2xA100", tensor=2, prompt=5000, output=10, batch=4)
    found = predict(setting)
    assert found.seconds == pytest.approx(found.ttft + 9 * found.tpot)
    assert found.tokens_per_second == pytest.approx(4 * 5010 / found.seconds)
    assert sum(found.prefill.values()) == pytest.approx(found.ttft)
    assert found.source == MODELLED


def test_replicas_share_the_requests():
    one, two = predict(_setting(batch=4)), predict(_setting("2xA100", data=2, batch=8))
    assert two.seconds == one.seconds and two.tokens_per_second == pytest.approx(2 * one.tokens_per_second)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"layout: expected at most the 2 GPUs of 2×A6000 pcie4, found 4 × 1"):
        _setting("2xA6000", tensor=4)
    with pytest.raises(ValueError, match=r"expected a number of ranks that divides .* found 3 ranks"):
        _setting("3xA6000", tensor=3)
    with pytest.raises(ValueError, match=r"prompt: expected a positive integer, found 0"):
        _setting(prompt=0)


# Memory.


def test_pieces_make_any_prompt_fit_where_nothing_grows():
    bf16 = torch.bfloat16
    assert math.isinf(Memory.of(model_named("mamba-2.8B"), 1, bf16).longest(48e9, 1))
    attention = Memory.of(model_named("zamba-7B"), 1, bf16)
    longest = attention.longest(48e9, 1)
    assert attention.needed(batch=1, tokens=longest, at_once=2048) <= 48e9
    assert attention.needed(batch=1, tokens=longest + 1, at_once=2048) > 48e9
    assert attention.longest(10e9, 1) == 0


def test_in_one_piece_more_ranks_hold_longer_prompts():
    model = model_named("mamba-2.8B")
    for way in (ONE_PIECE, STATES_OF_ALL_TOKENS):
        one, four = (Memory.of(model, ranks, torch.bfloat16, way).longest(48e9, 1, way) for ranks in (1, 4))
        assert one < four < math.inf


# Words.


def test_models_and_machines_by_name():
    assert str(cluster_named("2x4xA100")) == "2×4×A100-80 nvlink3, ethernet-100g"
    assert cluster_named("1xa6000").device is DEVICES["A6000"]
    assert cluster_named("2xA6000", within="bridge").within is LINKS["bridge"]
    assert model_named("falcon-mamba-7B").name == "falcon_mamba-7B"
    with pytest.raises(ValueError, match=r"gpus: expected one of A6000, .* found 'B300'"):
        cluster_named("4xB300")
    for words in ("A100", "0xA100", "4x0xA100", "four A100"):
        with pytest.raises(ValueError, match=r"gpus: expected GPUs, or hosts and GPUs of each"):
            cluster_named(words)
    with pytest.raises(ValueError, match=r"between: expected one of pcie4, .* found 'pigeons'"):
        cluster_named("2x4xA100", between="pigeons")
    with pytest.raises(
        ValueError, match=r"model: expected a directory with config.json, or one of mamba-.*, found 'gpt-2'"
    ):
        model_named("gpt-2")


def test_a_checkpoint_is_a_model(tmp_path):
    config = _tiny().config
    config.architectures = ["MambaForCausalLM"]
    config.save_pretrained(tmp_path)
    found = model_named(str(tmp_path))
    assert found.family is families()["mamba"] and len(found.plan.layers) == 3


# Advice.


def _advise(cluster: Cluster, model: Model, **options):
    return advise(model, cluster, **{"prompt": 1024, "output": 128, "batch": 16, **options})


def test_links_that_cost_nothing_want_tensor_parallelism_for_latency_and_dead_ones_none():
    cluster, model = cluster_named("4xA100"), model_named("falcon_mamba-7B")
    free, dead = (replace(cluster, within=replace(cluster.within, rate=rate)) for rate in (1e15, 1e6))
    assert _advise(free, model).latency.best.setting.tensor == 4
    found = _advise(dead, model)
    assert found.latency.best.setting.tensor == 1 and found.throughput.best.setting.tensor == 1
    assert any("messages between ranks" in reason for reason in found.latency.reasons)


def test_a_model_that_one_gpu_cannot_hold_is_cut():
    cluster, model = cluster_named("4xA100"), model_named("falcon_mamba-7B")
    small = replace(cluster, device=replace(cluster.device, memory=7e9))
    found = _advise(small, model)
    assert found.throughput.best.setting.tensor == 4
    assert any("tensor 1 × data 4" in each and "GB a rank" in each for each in found.left_out)
    tiny = replace(cluster, device=replace(cluster.device, memory=1e9))
    with pytest.raises(ValueError, match=r"gpus: expected a layout of .*found none: tensor 1 × data 4"):
        _advise(tiny, model)


def test_layouts_that_do_not_divide_are_named():
    found = _advise(cluster_named("3xA100"), model_named("mamba-130M"), prompt=64)
    assert not any("tensor 3:" in each for each in found.left_out)  # 1536 channels in three
    found = _advise(cluster_named("5xA100"), model_named("mamba-130M"), prompt=64)
    assert found.latency.best.setting.tensor == 1
    assert any(each.startswith("tensor 5: ") and "found 5 ranks" in each for each in found.left_out)


def test_requests_that_do_not_all_fit_run_in_turns():
    """Zamba's keys and values grow: of 64 × 8,320 tokens a part fits 48 GB."""
    found = _advise(cluster_named("2xA6000"), model_named("zamba-7B"), prompt=8192, batch=64).throughput
    setting = found.best.setting
    assert setting.batch in (4, 8, 16, 32) and found.best.prediction.fits
    assert found.reasons[0] == f"{setting.batch} of 64 requests fit at once; the others wait"
    assert not predict(replace(setting, batch=2 * setting.batch)).fits
