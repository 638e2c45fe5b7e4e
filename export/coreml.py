"""Writing Core ML packages (ML programs) from float and quantised graphs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from deploykit.errors import DeploykitError, TargetMissingError, UsageError, one_line
from deploykit.export.coreml_graph import minimum_target, prepared
from deploykit.export.coreml_package import write_package
from deploykit.export.coreml_program import check_names, computed_in_float32, count_layers
from deploykit.export.registry import Exported, Profile, Reader, Source, register_exporter
from deploykit.graph import ops as _registered  # noqa: F401  makes torch.ops.deploykit
from deploykit.graph.edit import is_op
from deploykit.targets.coreml import import_coremltools, quiet

if TYPE_CHECKING:
    from deploykit.export.coreml_lowering import Lowering

__all__ = ["INPUT_NAME", "MAX_BATCH", "OUTPUT_NAME", "Coreml"]

INPUT_NAME, OUTPUT_NAME = "image", "logits"
MAX_BATCH = 64
READER_NAME = "MIL evaluated in torch: graph and stored weights, not the device's arithmetic"

_OPS = torch.ops.deploykit
_SYSTEMS = {16: "iOS 16 / macOS 13", 17: "iOS 17 / macOS 14", 18: "iOS 18 / macOS 15"}
_TABLE_QUANTIZERS = (_OPS.fake_quantize_log.default, _OPS.fake_quantize_twin.default)
# It multiplies the scales of both inputs of a sum by one factor: the same values, but then the
# file holds other scales than the graph.
_RESCALING_STEP = "common::distributive_quantized_binary_op_scale_normalization"


@register_exporter("coreml")
class Coreml:
    """ML programs in an ``.mlpackage``.

    The file holds the graph's own codes: weights as ``constexpr`` operators, activations as
    ``quantize`` and ``dequantize``. Biases are floats: Core ML has no integer ones. Scales have
    the type of the floats beside them: in a float16 file they are the graph's, rounded.

    Args:
        floats: what is not quantised is stored and computed in. The Neural Engine has float16
            only.
        palettize_bits: give a float graph weights of 2**bits values by coremltools' own k-means,
            a table for each layer. Not our codes, and refused for a graph that has some.
    """

    name: str
    suffix: str = ".mlpackage"
    profile: Profile = "asymmetric"

    def __init__(
        self,
        floats: Literal["fp16", "fp32"] = "fp16",
        palettize_bits: Literal[1, 2, 3, 4, 6, 8] | None = None,
    ) -> None:
        self.floats = floats
        self.palettize_bits = palettize_bits

    def available(self) -> str | None:
        """None, or why coremltools can't be imported."""
        try:
            import_coremltools()
            if self.palettize_bits is not None:
                _need_sklearn()
        except TargetMissingError as error:
            return str(error)
        return None

    def export(self, source: Source, path: Path) -> Exported:
        """Write a package folder at ``path``.

        The input is ``image`` float32 (batch, 3, S, S), the output ``logits`` float32
        (batch, classes), whatever the floats inside. A dynamic batch goes from 1 to MAX_BATCH.

        Raises:
            TargetMissingError: coremltools (or scikit-learn, for palettes) is not installed.
            UsageError: palettes were asked for a quantised graph.
            DeploykitError: coremltools can't convert the graph.
        """
        ct = import_coremltools()
        quantized = any(is_op(n, _OPS.dequantize.default) for n in source.graph_module.graph.nodes)
        if self.palettize_bits is not None:
            _need_sklearn()
            if quantized:
                message = f"palettes are for float graphs, {source.precision} has codes already"
                raise UsageError(message)
        from deploykit.export.coreml_lowering import Lowering

        target = minimum_target(source.graph_module)
        lowering = Lowering(blockwise=target >= 18)
        dynamic, notes = source.dynamic_batch, []
        try:
            with torch.no_grad(), quiet():
                try:
                    model = self._convert(ct, source, lowering, target, dynamic)
                except Exception as error:
                    if not dynamic:
                        raise
                    notes.append(
                        f"batch fixed at 1: coremltools refused others ({one_line(error)})"
                    )
                    dynamic = False
                    model = self._convert(ct, source, lowering, target, dynamic)
                if self.palettize_bits is not None:
                    model = _palettize(ct, model, self.palettize_bits)
        except Exception as error:  # the converter raises many unrelated types
            message = f"{source.backbone.name} can't be exported to Core ML: {one_line(error)}"
            raise DeploykitError(message) from error
        function = model._mil_program.functions["main"]
        check_names(function, INPUT_NAME, OUTPUT_NAME)
        write_package(model, path, source.backbone.name, source.metadata)
        return Exported(
            precision=self._precision(source.precision),
            dynamic_batch=dynamic,
            notes=(*self._notes(source, target, dynamic, function), *notes),
            layers=count_layers(function),
            half=self.floats == "fp16",
        )

    def reader(self, path: Path) -> tuple[str, Reader]:
        """The package's program, operator by operator in torch; see ``mil_evaluate``."""
        from deploykit.export.mil_evaluate import MilProgram

        return READER_NAME, MilProgram(path)

    def _convert(
        self, ct: Any, source: Source, lowering: Lowering, target: int, dynamic: bool
    ) -> Any:
        size = source.backbone.preprocessing.size
        example = torch.zeros(2 if dynamic else 1, 3, size, size)
        batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                prepared(source.graph_module),
                (example,),
                dynamic_shapes=({0: batch},) if dynamic else None,
            ).run_decompositions({})
        # With a range Core ML may use the Neural Engine for the default shape, which is batch 1.
        sizes = ct.RangeDim(1, MAX_BATCH, default=1) if dynamic else 1
        pipeline = ct.PassPipeline.DEFAULT
        pipeline.remove_passes({_RESCALING_STEP})
        precision = ct.precision.FLOAT32
        if self.floats == "fp16":
            precision = ct.transform.FP16ComputePrecision(op_selector=lowering.may_be_half)
        with lowering.registered():
            return ct.convert(
                program,
                inputs=[ct.TensorType(INPUT_NAME, (sizes, 3, size, size), np.float32)],
                outputs=[ct.TensorType(OUTPUT_NAME, dtype=np.float32)],
                convert_to="mlprogram",
                minimum_deployment_target=getattr(ct.target, f"iOS{target}"),
                compute_precision=precision,
                pass_pipeline=pipeline,
                skip_model_load=True,
            )

    def _precision(self, graph: str) -> str:
        if self.palettize_bits is not None:
            return f"{self.floats}, weights in palettes of {2**self.palettize_bits}"
        return self.floats if graph == "fp32" else graph

    def _notes(self, source: Source, target: int, dynamic: bool, function: Any) -> list[str]:
        nodes = source.graph_module.graph.nodes
        quantizers = sum(is_op(node, _OPS.fake_quantize.default) for node in nodes)
        tables = sum(is_op(node, *_TABLE_QUANTIZERS) for node in nodes)
        notes = [f"needs {_SYSTEMS[target]} or later; floats are {self.floats}"]
        if dynamic:
            notes.append(
                f"takes 1 to {MAX_BATCH} images; Core ML may leave the Neural Engine for batches "
                "above 1, a fixed batch of 1 is the safest for speed"
            )
        if quantizers:
            notes.append(
                f"{quantizers} activations are carried as 8-bit codes; whether integers are "
                "multiplied is up to Core ML and the chip"
            )
        if tables:
            notes.append(f"{tables} activations without equal steps go through a table")
        left = computed_in_float32(function) if self.floats == "fp16" else {}
        if left:
            listed = ", ".join(f"{count} {kind}" for kind, count in left.items())
            notes.append(f"stays float32, where float16 would change codes or overflow: {listed}")
        if self.palettize_bits is not None:
            notes.append("palettes by coremltools' k-means, not by deploykit")
        return notes


def _need_sklearn() -> None:
    try:
        import sklearn.cluster  # noqa: F401
    except ImportError as error:
        message = "palettes need scikit-learn; pip install 'deploykit-vision[coreml]'"
        raise TargetMissingError(message) from error


def _palettize(ct: Any, model: Any, bits: int) -> Any:
    """Weights of 512 values and more; a table would save nothing on smaller ones."""
    coreml = ct.optimize.coreml
    config = coreml.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=512)
    return coreml.palettize_weights(model, coreml.OptimizationConfig(global_config=config))
