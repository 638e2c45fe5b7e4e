"""Turning a float TFLite model with quantise operators into an integer one with given codes.

The converter keeps our quantisers as QUANTIZE and DEQUANTIZE around float layers and fuses
nothing. Here each layer whose weight is known to be ``codes * scale`` becomes what TFLite's
integer kernels take, and no code is chosen anew:

* input from a DEQUANTIZE, output into a QUANTIZE: int8 in, int8 out, the bias int32;
* a fully connected layer that chooses its input's grid: int8 or int4 weight, float in and out;
* any other: the weight is int8 in the file and dequantised once, when the file is loaded.

Types are those of TensorFlow's public ``schema.fbs``.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Weight", "put_codes"]

_MOST_CODES = 127
_FLOAT, _INT32, _INT8, _INT4 = 0, 2, 9, 17  # TensorType
_PAD, _RESHAPE, _TRANSPOSE = 34, 22, 39  # BuiltinOperator, as are the rest
_MOVES = (_PAD, _RESHAPE, _TRANSPOSE)
_QUANTIZE, _DEQUANTIZE = 114, 6
_CONV, _DEPTHWISE, _FULLY_CONNECTED = 3, 4, 9
# the first version of each operator that takes what is made of it here
_VERSIONS = {_CONV: 3, _DEPTHWISE: 3, _FULLY_CONNECTED: 7, _PAD: 2, _TRANSPOSE: 2, _DEQUANTIZE: 5}


@dataclass(frozen=True)
class Weight:
    """Codes of a layer: int8 (out, ...) in PyTorch's order, scale float32 (out,)."""

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    bits: int
    kind: str
    keeps_grid: bool


@dataclass(frozen=True)
class _Stored:
    """A weight's codes in TFLite's order, flat."""

    codes: NDArray[np.int8]
    weight: Weight


def put_codes(model: Any, weights: Iterable[Weight]) -> Counter[str]:
    """Rewrite a model (``ModelT``) in place.

    Returns:
        Layers by what computes them: ``int8``, ``int8 dynamic``, ``int4 dynamic``, ``float with
        int8 weights`` and ``float``.
    """
    editor = _Editor(model)
    known = {key: stored for weight in weights for key, stored in _layouts(weight)}
    counts: Counter[str] = Counter()
    for operator in list(editor.graph.operators):
        code = editor.code(operator)
        if code not in (_CONV, _DEPTHWISE, _FULLY_CONNECTED):
            continue
        data = editor.data(operator.inputs[1])
        stored = None if data is None else known.get(_key(data))
        if stored is None:
            counts["float"] += 1
        elif stored.weight.kind == "static" and editor.make_static(operator, stored):
            counts["int8"] += 1
        elif stored.weight.kind == "dynamic" and code == _FULLY_CONNECTED:
            editor.make_dynamic(operator, stored)
            counts[f"int{4 if stored.weight.bits <= 4 else 8} dynamic"] += 1
        else:
            editor.store_integers(operator, stored)
            counts["float with int8 weights"] += 1
    editor.drop_dead()
    return counts


def _layouts(weight: Weight) -> Iterable[tuple[bytes, _Stored]]:
    """The weight as a TFLite layer may hold it: (out, …, in), or (1, …, out) if depthwise."""
    codes = weight.codes
    orders: list[tuple[int, ...]] = [tuple(range(codes.ndim))]
    if codes.ndim == 4:
        orders = [(0, 2, 3, 1)]
        if codes.shape[1] == 1:
            orders.append((1, 2, 3, 0))
    scale = weight.scale.reshape(-1, *[1] * (codes.ndim - 1))
    values = codes.astype(np.float32) * scale
    for order in orders:
        laid = np.ascontiguousarray(values.transpose(order))
        yield _key(laid.tobytes()), _Stored(codes.transpose(order).reshape(-1), weight)


def _key(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class _Editor:
    """The first subgraph of a model, and what can be done to it."""

    def __init__(self, model: Any) -> None:
        from ai_edge_litert import schema_py_generated

        self._schema: Any = schema_py_generated
        self.model = model
        self.graph = model.subgraphs[0]
        self._producer = {out: op for op in self.graph.operators for out in op.outputs}
        self._readers: dict[int, list[Any]] = defaultdict(list)
        for op in self.graph.operators:
            for source in op.inputs:
                self._readers[source].append(op)
        self._as_codes: dict[int, int] = {}

    def code(self, operator: Any) -> int:
        entry = self.model.operatorCodes[operator.opcodeIndex]
        return int(max(entry.builtinCode, entry.deprecatedBuiltinCode))

    def data(self, tensor: int) -> bytes | None:
        stored = self.model.buffers[self.graph.tensors[tensor].buffer].data
        return None if stored is None else np.asarray(stored, dtype=np.uint8).tobytes()

    def make_static(self, operator: Any, stored: _Stored) -> bool:
        """int8 in, int8 out; False if the input or the output turns out to have no grid."""
        source, path = self._codes_of(operator.inputs[0]), self._way_to_quantize(operator)
        if source is None or path is None:
            return False
        operator.inputs[0] = source
        operator.inputs[1] = self._weight(operator, stored, _INT8)
        (input_scale,) = self._grid(source).scale
        if len(operator.inputs) > 2 and operator.inputs[2] >= 0:
            operator.inputs[2] = self._bias(operator.inputs[2], input_scale, stored.weight.scale)
        *moves, quantize = path
        (result,) = quantize.outputs
        for step in (operator, *moves):
            last = step is (moves[-1] if moves else operator)
            if last:
                step.outputs = [result]
            else:
                self._to_int8(step.outputs[0], self._grid(result))
            self._raise_version(step)
        self.graph.operators.remove(quantize)
        return True

    def make_dynamic(self, operator: Any, stored: _Stored) -> None:
        """Integer weight, float input and output: the kernel quantises each row of the input."""
        if not stored.weight.keeps_grid:
            self._drop_grid(operator)
        narrow = stored.weight.bits <= 4
        operator.inputs[1] = self._weight(operator, stored, _INT4 if narrow else _INT8)
        operator.builtinOptions.asymmetricQuantizeInputs = True
        self._raise_version(operator)

    def store_integers(self, operator: Any, stored: _Stored) -> None:
        """Codes in the file, floats in the layer."""
        old = operator.inputs[1]
        codes = self._weight(operator, stored, _INT8)
        values = self._tensor(self.graph.tensors[old].shape, _FLOAT, 0, None)
        operator.inputs[1] = values
        index = self.graph.operators.index(operator)
        self.graph.operators.insert(index, self._operator(_DEQUANTIZE, [codes], [values]))

    def drop_dead(self) -> None:
        """Remove operators and stored data that nothing needs any more."""
        operators = self.graph.operators
        while True:
            needed = {i for op in operators for i in op.inputs} | set(self.graph.outputs)
            dead = [op for op in operators if not needed.intersection(op.outputs)]
            if not dead:
                break
            for op in dead:
                operators.remove(op)
        used = {i for op in operators for i in (*op.inputs, *op.outputs)}
        kept = {self.graph.tensors[i].buffer for i in used if i >= 0}
        for index, tensor in enumerate(self.graph.tensors):
            if index not in used and tensor.buffer not in kept:
                self.model.buffers[tensor.buffer].data = None

    def _codes_of(self, tensor: int) -> int | None:
        """The int8 tensor behind a float one that is only dequantised and moved about."""
        if tensor in self._as_codes:
            return self._as_codes[tensor]
        producer = self._producer.get(tensor)
        if producer is None:
            return None
        found: int | None = None
        if self.code(producer) == _DEQUANTIZE:
            found = int(producer.inputs[0])
            found = None if self.data(found) is not None else found
        elif self.code(producer) in _MOVES:
            source = self._codes_of(producer.inputs[0])
            if source is not None:
                found = self._move_codes(producer, source, tensor)
        if found is not None:
            self._as_codes[tensor] = found
        return found

    def _drop_grid(self, operator: Any) -> None:
        """Read what lies before QUANTIZE, DEQUANTIZE and moves that nothing else needs.

        The pair was of use until now: it kept the converter from merging what comes before the
        layer into its weight.
        """
        while True:
            tensor = operator.inputs[0]
            producer = self._producer.get(tensor)
            if producer is None:
                return
            if self.code(producer) == _DEQUANTIZE:
                quantize = self._producer.get(producer.inputs[0])
                if quantize is not None and self.code(quantize) == _QUANTIZE:
                    operator.inputs[0] = quantize.inputs[0]
                return
            if self.code(producer) not in _MOVES or len(self._readers[tensor]) != 1:
                return
            operator = producer

    def _move_codes(self, move: Any, source: int, tensor: int) -> int:
        """The same move on integers, beside the one on floats (which may have other readers)."""
        shape = self.graph.tensors[tensor].shape
        result = self._tensor(shape, _INT8, 0, self._grid(source))
        again = self._operator(self.code(move), [source, *move.inputs[1:]], [result])
        again.builtinOptionsType = move.builtinOptionsType
        again.builtinOptions = move.builtinOptions
        self.graph.operators.insert(self.graph.operators.index(move), again)
        return result

    def _way_to_quantize(self, operator: Any) -> list[Any] | None:
        """The moves after a layer and the QUANTIZE at their end, if nothing else reads it."""
        path: list[Any] = []
        while True:
            (result,) = operator.outputs
            readers = self._readers[result]
            if len(readers) != 1 or result in self.graph.outputs:
                return None
            operator = readers[0]
            path.append(operator)
            if self.code(operator) == _QUANTIZE:
                return path
            if self.code(operator) not in _MOVES:
                return None

    def _grid(self, tensor: int) -> Any:
        return self.graph.tensors[tensor].quantization

    def _to_int8(self, tensor: int, grid: Any) -> None:
        self.graph.tensors[tensor].type = _INT8
        self.graph.tensors[tensor].quantization = grid

    def _weight(self, operator: Any, stored: _Stored, kind: int) -> int:
        axis = 3 if self.code(operator) == _DEPTHWISE else 0
        shape = self.graph.tensors[operator.inputs[1]].shape
        codes = _packed(stored.codes) if kind == _INT4 else stored.codes.view(np.uint8)
        return self._tensor(shape, kind, self._buffer(codes), self._scales(stored, axis))

    def _scales(self, stored: _Stored, axis: int) -> Any:
        return self._made_grid(stored.weight.scale.tolist(), axis)

    def _bias(self, tensor: int, input_scale: float, scale: NDArray[np.float32]) -> int:
        data = self.data(tensor)
        assert data is not None
        steps = np.float32(input_scale) * scale
        codes = np.rint(np.frombuffer(data, np.float32).astype(np.float64) / steps)
        limits = np.iinfo(np.int32)
        codes = codes.clip(limits.min, limits.max).astype(np.int32)
        buffer = self._buffer(codes.view(np.uint8))
        return self._tensor([len(codes)], _INT32, buffer, self._made_grid(steps.tolist(), 0))

    def _made_grid(self, scales: Sequence[float], axis: int) -> Any:
        grid = self._schema.QuantizationParametersT()
        grid.scale, grid.zeroPoint = list(scales), [0] * len(scales)
        grid.quantizedDimension = axis
        return grid

    def _buffer(self, data: NDArray[np.uint8]) -> int:
        buffer = self._schema.BufferT()
        buffer.data = data
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1

    def _tensor(self, shape: Sequence[int], kind: int, buffer: int, grid: Any) -> int:
        tensor = self._schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer = list(shape), kind, buffer
        tensor.name, tensor.quantization = f"codes_{len(self.graph.tensors)}", grid
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def _operator(self, code: int, inputs: Sequence[int], outputs: Sequence[int]) -> Any:
        codes = self.model.operatorCodes
        known = [max(one.builtinCode, one.deprecatedBuiltinCode) for one in codes]
        if code not in known:
            entry = self._schema.OperatorCodeT()
            entry.builtinCode = entry.deprecatedBuiltinCode = code
            codes.append(entry)
            known.append(code)
        operator = self._schema.OperatorT()
        operator.opcodeIndex = known.index(code)
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        self._raise_version(operator)
        return operator

    def _raise_version(self, operator: Any) -> None:
        entry = self.model.operatorCodes[operator.opcodeIndex]
        entry.version = max(entry.version, _VERSIONS.get(self.code(operator), 1))


def _packed(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two 4-bit codes a byte, the first in the low half."""
    padded = np.append(codes, np.zeros(len(codes) % 2, np.int8)).view(np.uint8) & 0xF
    return np.asarray(padded[::2] | (padded[1::2] << 4), dtype=np.uint8)
