"""Checkpoints that others have written, or that are damaged: read with care, and refused by name."""

from __future__ import annotations

import enum
import io
import json
import os
import pickle
import re
import sys
import types
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_megatron_checkpoints import WRITERS, _form, _padded, numbered, write, writer

from megatron_ssm.checkpoint.megatron_directory import TRACKER, find_iteration, format_of, open_megatron
from megatron_ssm.checkpoint.torch_file import complete, lay_out, write_values
from megatron_ssm.checkpoint.untrusted_pickle import load_metadata
from megatron_ssm.hybrid.form import EMBEDDING, FINAL_NORM, HEAD

VERSIONS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
RUN = "model_optim_rng.pt"


class _Harmful:
    """Pickled, it is a call that leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def attention_backend(monkeypatch):
    """An enumeration of Megatron's, as training arguments hold them, that is not installed."""
    module = types.ModuleType("megatron.training.kinds")
    module.Backend = enum.Enum("Backend", {"flash": 1}, module=module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.Backend.flash


def _written(variant, kind, folder, ranks=2, stages=1):
    tensors = _padded(variant, ranks)
    wholes = numbered(tensors)
    write(kind, folder, tensors, wholes, ranks, stages, Namespace(hidden_size=1))
    return wholes


def _save_by_torch(folder, content, common):
    """What torch's own writer makes of tensors and bytes, with Megatron's files around it."""
    dcp.save(content, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    torch.save(common, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(VERSIONS))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_a_training_run_adds_is_left_out_and_other_names_are_known(tmp_path, attention_backend):
    wholes = numbered(_form("jamba"))
    content = {}
    for name, whole in wholes.items():
        layer = name.partition(".mixer.in_proj.layer_norm_weight")[0]
        if layer != name:
            content[f"{layer}.norm.weight"] = whole
        elif name.endswith("mlp.linear_fc1.weight"):
            content[f"{name}_w"], content[f"{name}_v"] = whole.chunk(2)
        elif name.endswith("in_proj.weight"):
            content[f"{name}.x"], content[f"{name}.z"] = whole.chunk(2)
        else:
            content[name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")] = whole
    model = set(content)
    content |= {f"optimizer.state.exp_avg.{name}": content[name] for name in list(content)[:3]}
    content["chained_0.optimizer.state.exp_avg.x"] = torch.zeros(2)
    content["rng_state/shard_0_1"] = io.BytesIO(b"state")
    content["decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1"] = io.BytesIO(b"state")
    common = {"args": Namespace(hidden_size=24, backend=attention_backend), "iteration": 7, "checkpoint_version": 3.0}
    _save_by_torch(tmp_path, content, common)
    reader = open_megatron(tmp_path, _form("jamba"))
    assert set(reader.shapes()) == set(wholes) and len(model) > len(wholes)
    for name, whole in wholes.items():
        assert torch.equal(reader.read(name), whole), name
    assert reader.common["iteration"] == 7 and reader.common["args"].hidden_size == 24
    assert "megatron.training.kinds.Backend" in repr(reader.common["args"].backend)


def _older(folder, wholes, **more):
    path = folder / "mp_rank_00" / RUN
    path.parent.mkdir(parents=True)
    torch.save({"model": dict(wholes), "args": None, "iteration": 3, "checkpoint_version": 3.0, **more}, path)
    return path


def test_what_a_training_run_adds_to_the_older_format_is_left_out(tmp_path, attention_backend):
    wholes = numbered(_form("mamba2"))
    model = {name.replace("mixer.in_proj.layer_norm_weight", "norm.weight"): whole for name, whole in wholes.items()}
    model["decoder.layers.0.mixer.in_proj._extra_state"] = io.BytesIO(b"state")
    out = "decoder.layers.0.mixer.out_proj.weight"
    model[out] = torch.nn.Parameter(wholes[out].t().contiguous().t())  # neither contiguous nor a plain tensor
    random = [{"np_rng_state": np.random.get_state(), "rng_tracker_states": {}}]
    _older(tmp_path, model, args=Namespace(backend=attention_backend), rng_state=random)
    reader = open_megatron(tmp_path, _form("mamba2"))
    assert set(reader.shapes()) == set(wholes)
    for name, whole in wholes.items():
        assert torch.equal(reader.read(name), whole), name
    assert reader.common["iteration"] == 3


@pytest.mark.parametrize("kind", WRITERS)
def test_tensors_that_the_model_does_not_have_are_told(kind, tmp_path):
    wholes = _written("mamba", kind, tmp_path)
    known = {name: tensor for name, tensor in _form("mamba").items() if name != FINAL_NORM}
    reader = open_megatron(tmp_path, known)
    assert reader.shapes()[FINAL_NORM] == tuple(wholes[FINAL_NORM].shape)
    assert torch.equal(reader.read(FINAL_NORM), wholes[FINAL_NORM])


# Nothing that a pickle says is done.


@pytest.mark.filterwarnings("ignore:the arguments of the training run")
def test_a_harmful_pickle_is_refused(tmp_path):
    mark, form = tmp_path / "mark", _form("mamba")
    older = _older(tmp_path / "older", {}, args=_Harmful(mark))
    with pytest.raises(ValueError, match=rf"{re.escape(str(older))}.*mkdir.*refused"):
        open_megatron(tmp_path / "older", form)
    _written("mamba", "torch_dist", tmp_path / "new")
    torch.save({"args": _Harmful(mark)}, tmp_path / "new" / "common.pt")
    with pytest.warns(UserWarning, match=r"common\.pt.*mkdir"):
        reader = open_megatron(tmp_path / "new", form)
    assert reader.common["args"] is None
    metadata = tmp_path / "new" / ".metadata"
    metadata.write_bytes(pickle.dumps(_Harmful(mark)))
    with pytest.raises(ValueError, match=rf"{re.escape(str(metadata))}.*mkdir"):
        open_megatron(tmp_path / "new", form)
    assert not mark.exists()


def test_metadata_may_not_lead_out_of_the_directory(tmp_path):
    _written("mamba", "torch_dist", tmp_path)
    metadata = load_metadata(tmp_path / ".metadata")
    next(iter(metadata.storage_data.values())).relative_path = "../secret"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"found '\.\./secret'"):
        open_megatron(tmp_path, _form("mamba"))


# What is damaged or lacking is named.


def test_a_directory_without_a_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=rf"{TRACKER}.*found model.safetensors"):
        find_iteration(tmp_path)
    with pytest.raises(ValueError, match=r"torch_dist.*legacy.*found model.safetensors"):
        format_of(tmp_path)
    with pytest.raises(ValueError, match="no such directory"):
        find_iteration(tmp_path / "nothing")
    (tmp_path / TRACKER).write_text("12")
    with pytest.raises(ValueError, match="expected a directory iter_0000012, found"):
        find_iteration(tmp_path)
    (tmp_path / TRACKER).write_text("latest")
    with pytest.raises(ValueError, match="expected an iteration's number or 'release', found 'latest'"):
        find_iteration(tmp_path)


def _drop(tensors, name):
    for part in ("z", "x", "B", "C", "dt"):
        del tensors[f"{name}.{part}"]


def test_the_new_format_damaged(tmp_path):
    _written("mamba2", "torch_dist", tmp_path)
    form, described = _form("mamba2"), (tmp_path / ".metadata").read_bytes()
    metadata = load_metadata(tmp_path / ".metadata")

    def store(change):
        broken = pickle.loads(described)
        change(broken.state_dict_metadata)
        (tmp_path / ".metadata").write_bytes(pickle.dumps(broken))

    projection = "decoder.layers.0.mixer.in_proj.weight"
    store(lambda tensors: tensors.pop(f"{projection}.B"))
    with pytest.raises(ValueError, match=rf"expected {re.escape(projection)}\.B beside {re.escape(projection)}\.z"):
        open_megatron(tmp_path, form)
    store(lambda tensors: tensors.update({projection: tensors[f"{projection}.z"]}) or _drop(tensors, projection))
    with pytest.raises(ValueError, match=rf"expected a tensor a part of {re.escape(projection)} .* found one for all"):
        open_megatron(tmp_path, form)
    store(lambda tensors: tensors[EMBEDDING].chunks.pop())
    with pytest.raises(ValueError, match=rf"{EMBEDDING}: expected chunks of \d+ values together, found"):
        open_megatron(tmp_path, form)
    (tmp_path / ".metadata").write_bytes(described[:100])
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        open_megatron(tmp_path, form)
    (tmp_path / ".metadata").write_bytes(described)
    file = tmp_path / metadata.storage_data[next(iter(metadata.storage_data))].relative_path
    os.truncate(file, 200)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is cut off: expected"):
        open_megatron(tmp_path, form)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: expected a file of .* found none"):
        open_megatron(tmp_path, form)
    (tmp_path / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"expected \.metadata beside metadata\.json"):
        format_of(tmp_path)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ValueError, match="expected the format torch_dist, found 'zarr'"):
        format_of(tmp_path)


def _edit(path, change):
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(path, weights_only=True)
    change(content["model"])
    torch.save(content, path)


def test_the_older_format_damaged(tmp_path):
    _written("mamba", "legacy", tmp_path)
    form, path = _form("mamba"), tmp_path / "mp_rank_01" / RUN
    good, projection = path.read_bytes(), "decoder.layers.1.mixer.in_proj.weight"

    def message():
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
            reader = open_megatron(tmp_path, form)
            for name in reader.shapes():
                reader.read(name)
        return str(error.value)

    _edit(path, lambda model: model.update({projection: model[projection][1:].clone()}))
    assert re.search(rf"mp_rank_01.*{projection}.*shape \[\d+, \d+\], found \[\d+, \d+\]", message())
    path.write_bytes(good)
    _edit(path, lambda model: model.update({projection: model[projection].half()}))
    assert re.search(rf"mp_rank_01.*{projection}: expected torch.float32 as in .*mp_rank_00.*float16", message())
    path.write_bytes(good)
    _edit(path, lambda model: model.pop(projection))
    assert re.search(rf"mp_rank_01.*expected a piece of tensor {projection}", message())
    path.write_bytes(good)
    _edit(path, lambda model: model[FINAL_NORM].add_(1))
    assert re.search(rf"mp_rank_01.*{FINAL_NORM}: expected what an earlier rank holds", message())
    path.write_bytes(good[:-100])
    assert re.search(r"mp_rank_01.*is no file that torch.save has written, or is damaged", message())
    torch.save([1, 2], path)
    assert "expected a dictionary with the tensors under 'model', found list" in message()
    path.unlink()
    assert "mp_rank_01: expected a file model_optim_rng.pt" in message()
    path.parent.rename(tmp_path / "mp_rank_02")
    assert "expected 3 tensor-parallel ranks in 1 stages, found no directory mp_rank_01" in message()
    (tmp_path / "mp_rank_02").rename(tmp_path / "mp_rank_01_000_001")
    assert "no expert parallelism" in message()


def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path):
    _written("bamba-bias-groups2", "legacy", tmp_path, stages=2)
    path = tmp_path / "mp_rank_01_001" / RUN
    _edit(path, lambda model: model[HEAD].add_(1))
    reader = open_megatron(tmp_path, _form("bamba-bias-groups2"))
    assert HEAD not in reader.shapes()
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*expected a copy of the embedding"):
        reader.read(EMBEDDING)


@pytest.mark.parametrize("kind", WRITERS)
def test_what_cannot_be_written_is_refused(kind, tmp_path):
    tensors = _padded("mamba", 2)
    wholes = numbered(tensors)
    with pytest.raises(ValueError, match="divides the 3 Megatron layers, found 2"):
        writer(kind, tmp_path / "a", tensors, wholes, 2, 2)
    with pytest.raises(ValueError, match=r"expected a number of ranks that divides .* found 7 ranks"):
        writer(kind, tmp_path / "a", tensors, wholes, 7, 1)
    assert not (tmp_path / "a").exists()
    writer(kind, tmp_path / "b", tensors, wholes, 2, 1)
    with pytest.raises(ValueError, match="another conversion was interrupted here: expected tensor_parallel_size 1"):
        writer(kind, tmp_path / "b", tensors, wholes, 1, 1)
    write(kind, tmp_path / "c", tensors, wholes, 2, 1)
    with pytest.raises(ValueError, match="expected an empty directory"):
        writer(kind, tmp_path / "c", tensors, wholes, 2, 1)


def test_a_file_larger_than_4_gigabytes(tmp_path):
    # Almost all of it is a hole.
    path, last = tmp_path / RUN, torch.arange(5.0)
    shapes = {"a": ((5 << 28, 2), torch.float16), "b": ((3,), torch.float32), "c": ((5,), torch.float32)}
    tensors = lay_out(shapes)
    checksums = dict.fromkeys(tensors, 0) | {"c": write_values(path, tensors["c"], last)}
    complete(path, {"model": tensors}, tensors, checksums)
    model = torch.load(path, weights_only=True, mmap=True)["model"]
    assert model["a"].shape == (5 << 28, 2) and model["a"][-1].tolist() == [0, 0]
    assert torch.equal(model["c"], last) and model["c"].data_ptr() % 64 == model["b"].data_ptr() % 64
    with zipfile.ZipFile(path) as archive:
        assert archive.read("archive/data/2") == last.numpy().tobytes()
