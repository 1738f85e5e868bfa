"""Loaders for Megatron-LM's converter: read a checkpoint of either kind and put its tensors on the queue."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path

import torch

from megatron_ssm.conversion.convert import PlannedConversion, plan_conversion
from megatron_ssm.conversion.from_megatron import MegatronSource
from megatron_ssm.conversion.options import DTYPES, HUGGING_FACE, KEEP, MEGATRON, Conversion
from megatron_ssm.conversion.plugin_protocol import DONE, Message, SsmMetadata, fields, messages, metadata
from megatron_ssm.conversion.plugin_queue import LoaderEnd


def add_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    """Add the options of a loader to the converter's.

    Args:
        parser: the converter's.
        source: "hf" or "megatron", what the loader reads.
    """
    group = parser.add_argument_group(title=f"SSM loader ({source})")
    group.add_argument(
        "--dtype",
        choices=(KEEP, *DTYPES),
        default=KEEP,
        help="of the weights (default keep); what is computed in fp32 is not rounded",
    )
    group.add_argument("--megatron-path", help="not needed; as stock plugins have it")
    if source == MEGATRON:
        group.add_argument(
            "--hf-config",
            type=Path,
            help="directory or config.json that says what the checkpoint is (default: its own hugging_face/)",
        )
        group.add_argument(
            "--loader-transformer-impl",
            choices=("local", "transformer_engine"),
            help="not needed: both implementations' names are known",
        )


def load_checkpoint(queue, args: argparse.Namespace, source: str) -> None:
    """Send a checkpoint to the saver, and wait for it.

    Args:
        queue: the converter's.
        args: its options.
        source: as in `add_arguments`.

    Raises:
        SystemExit: it cannot be read, or the saver has failed; the message says what was expected and what was found.
    """
    end = LoaderEnd(queue)
    try:
        with closing(plan_conversion(_options(args, source))) as planned:
            _send(end, planned, args.model_type)
        end.wait()
    except (ValueError, OSError) as error:
        end.exit()
        sys.exit(f"loader: error: {error}")
    except BaseException:
        end.exit()
        raise


def _options(args: argparse.Namespace, source: str) -> Conversion:
    return Conversion(
        source=source,
        target=MEGATRON,
        load=Path(args.load_dir),
        save=Path(args.save_dir),
        hf_config=args.hf_config if source == MEGATRON else None,
        dtype=args.dtype,
        make_vocab_size_divisible_by=1,  # nothing is padded on the queue
    )


def _send(end: LoaderEnd, planned: PlannedConversion, model_type: str) -> None:
    source = planned.source
    config = source.beside / "config.json" if source.beside.is_dir() else source.beside
    ssm = SsmMetadata(
        source=planned.options.source,
        hugging_face_config=config.read_text(),
        beside=str(source.beside.resolve()),
        files=tuple(str(file.resolve()) for file in source.files()),
        dtypes=planned.dtypes,
    )
    plan = source.family.plan(source.config)
    end.put(metadata(model_type, plan, planned.usual_dtype, ssm, _previous_sizes(planned)))
    for message in messages(planned.tensors):
        print(f"sending {message.name}")
        end.put(_filled(message, planned))
    end.put(DONE)


def _filled(message: Message, planned: PlannedConversion) -> dict[str, str | torch.Tensor]:
    content: dict[str, str | torch.Tensor] = {"name": message.name}
    for tensor in message.tensors:
        planned.source.verify(tensor)
        whole = planned.source.read(tensor, planned.dtypes[tensor.name])
        # The queue holds it longer than the source does.
        content |= {
            name: whole[part].clone(memory_format=torch.contiguous_format) for name, part in fields(tensor).items()
        }
    return content


def _previous_sizes(planned: PlannedConversion) -> dict[str, int]:
    if planned.options.source == HUGGING_FACE:
        return {"previous_tensor_parallel_size": 1, "previous_pipeline_parallel_size": 1}
    assert isinstance(planned.source, MegatronSource)
    names = {f"previous_{kind}_parallel_size": f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline")}
    found = {name: getattr(planned.source.arguments, argument, None) for name, argument in names.items()}
    return {name: size for name, size in found.items() if isinstance(size, int)}
