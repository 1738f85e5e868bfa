"""A family's model as a MambaModel of megatron-core: made from a Hugging Face config, filled from any tensors."""

from __future__ import annotations

import torch
from megatron.core.models.mamba.mamba_model import MambaModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ssm.checkpoint.load import TensorSource
from megatron_ssm.collectives import EMBEDDING as EMBEDDING_SITE
from megatron_ssm.collectives.torch_reduction import TorchReduction
from megatron_ssm.families import Family
from megatron_ssm.hybrid.form import EMBEDDING, FINAL_NORM, HEAD, MegatronTensor, megatron_tensors
from megatron_ssm.specs import family_stack_spec, transformer_config

NO_LIMIT = 1 << 20  # of positions: nothing is allocated by it where positions are not embedded


class HybridModel(MambaModel):
    """megatron-core's model, which can tie embedding and head over pipeline stages also without a GPU."""

    def forward(self, input_ids: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
        """As MambaModel's.

        Args:
            input_ids: [B, L].
            arguments, keywords: of MambaModel's.

        Raises:
            ValueError: under sequence parallelism, the ranks do not divide L; on every rank.
        """
        ranks = self.pg_collection.tp.size()
        if self.pre_process and self.config.sequence_parallel and input_ids.shape[1] % ranks:
            raise ValueError(
                f"sequence parallelism: expected a number of tokens that {ranks} ranks divide, found "
                f"{input_ids.shape[1]}"
            )
        return super().forward(input_ids, *arguments, **keywords)

    def setup_embeddings_and_output_layer(self) -> None:
        """Let the first and the last stage begin with the same tied weight."""
        if torch.cuda.is_available() or self.pg_collection.pp.size() == 1:
            super().setup_embeddings_and_output_layer()
            return
        for weight in self._inputs_and_outputs():
            weight.is_embedding_or_output_parameter = True
        if self.share_embeddings_and_output_weights and self.pre_process != self.post_process:
            weight = self.shared_embedding_or_output_weight()
            weight.shared_embedding = True
            if not self.pre_process:
                weight.shared = True
                weight.data.zero_()
            weight.data.copy_(TorchReduction(self.embd_group).reduce(weight.data, EMBEDDING_SITE))

    def _inputs_and_outputs(self):
        if self.pre_process:
            yield self.embedding.word_embeddings.weight
        if self.post_process and self.output_layer.weight is not None:
            yield self.output_layer.weight


def padded_vocabulary(size: int, ranks: int, divisible_by: int = 128) -> int:
    """How many rows Megatron gives a vocabulary: the next multiple of `divisible_by` times the number of ranks."""
    multiple = divisible_by * ranks
    return -(-size // multiple) * multiple


def make_model(
    family: Family,
    config,
    groups: ProcessGroupCollection,
    *,
    vocabulary_rows: int | None = None,
    norms: str | None = None,
    parallel_output: bool = True,
    **changes,
) -> HybridModel:
    """The pipeline stage of a model that belongs to this rank, with fresh weights.

    Args:
        family: of the model.
        config: its Hugging Face config.
        groups: its `tp` and `pp` are the ranks that share the model.
        vocabulary_rows: of embedding and head; `padded_vocabulary` if left out. One seed gives one model, and one loss,
            at any number of ranks only where these rows are as many.
        norms: as in `megatron_ssm.specs`.
        parallel_output: each rank returns the logits of its own vocabulary rows.
        changes: further fields of Megatron's config, such as `params_dtype` or `sequence_parallel`.

    Raises:
        ValueError: what the ranks cannot share; an option that is not supported.
    """
    plan, ranks, stage, stages = family.plan(config), groups.tp.size(), groups.pp.rank(), groups.pp.size()
    family.check(config, ranks)
    changes = {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages, **changes}
    if stages > 1:
        changes.setdefault("pipeline_dtype", changes.get("params_dtype", torch.float32))
    return HybridModel(
        transformer_config(plan, **changes),
        family_stack_spec(plan, norms),
        vocab_size=vocabulary_rows or padded_vocabulary(plan.vocab_size, ranks),
        max_sequence_length=NO_LIMIT,
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        share_embeddings_and_output_weights=plan.tied,
        parallel_output=parallel_output,
        pg_collection=groups,
    )


@torch.no_grad()
def load_hugging_face(model: MambaModel, family: Family, config, source: TensorSource) -> None:
    """Fill this rank's pieces of a model from tensors by their names on disk; each is read, packed and cut by itself.

    Args:
        model: made by `make_model`, on this rank.
        family, config: of the model.
        source: whole tensors.
    """
    groups = model.pg_collection
    state = model.state_dict()
    for name, tensor in stage_tensors(model, family, config).items():
        tensor = tensor.padded(state[name].shape[0] * groups.tp.size())
        whole = tensor.packed(source.read)
        state[name].copy_(tensor.layout.shard(whole, groups.tp.rank(), groups.tp.size()))


def stage_tensors(model: MambaModel, family: Family, config) -> dict[str, MegatronTensor]:
    """The tensors of the Megatron form that this stage has, by their names in its state dict."""
    tensors, layers = megatron_tensors(family, config), model.decoder.layers
    first = layers[0].layer_number - 1
    here = {EMBEDDING: model.pre_process, FINAL_NORM: model.post_process, HEAD: model.post_process}
    found = {}
    for name, tensor in tensors.items():
        if tensor.layer is None and here[name]:
            found[name] = tensor
        elif tensor.layer is not None and 0 <= tensor.layer - first < len(layers):
            found[name.replace(f"layers.{tensor.layer}.", f"layers.{tensor.layer - first}.", 1)] = tensor
    if model.share_embeddings_and_output_weights and model.post_process and not model.pre_process:
        found[HEAD] = tensors[EMBEDDING]  # the last stage has a copy
    return found
