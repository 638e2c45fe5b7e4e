"""Own families cut down to a block a stage: the graph and the ONNX file at two batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from deploykit._compat import timm
from deploykit.backbones.families.cswin import CSWin
from deploykit.backbones.families.efficientvmamba import EfficientVMamba
from deploykit.backbones.families.fcaformer import FcaFormer
from deploykit.backbones.families.hornet import HorNet
from deploykit.backbones.families.l2vit import L2ViT
from deploykit.backbones.families.rmt import RMT
from deploykit.backbones.families.rmt import _Size as RMTSize
from deploykit.backbones.families.t2t_vit import T2TViT
from deploykit.backbones.families.transnext import TransNeXt
from deploykit.backbones.families.unireplknet import UniRepLKNet
from deploykit.backbones.families.vmamba import VMamba
from deploykit.backbones.families.vmamba import _Size as ScanSize
from deploykit.backbones.untrained import make_testable
from deploykit.export.onnx import onnx_bytes
from deploykit.graph.capture import capture
from deploykit.graph.signal import sqnr_db
from deploykit.runtimes import import_onnxruntime
from deploykit.types import Backbone, Preprocessing, WeightsOrigin

SIDE, CLASSES = 64, 5
ONE = (1, 1, 1, 1)
HEADS = (2, 2, 4, 4)


def deployed_unireplknet() -> nn.Module:
    module = UniRepLKNet(16, ONE, (13,), CLASSES)
    make_testable(module, 0, SIDE)
    deployed: nn.Module = timm.utils.reparameterize_model(module)
    return deployed


TINY: dict[str, Callable[[], nn.Module]] = {
    "cswin": lambda: CSWin(16, ONE, HEADS, CLASSES, SIDE),
    "efficientvmamba": lambda: EfficientVMamba(16, ONE, CLASSES),
    "fcaformer": lambda: FcaFormer((16, 16, 32, 32), (1, 1, 3, 2), (2, 2), CLASSES, SIDE),
    "hornet_7x7": lambda: HorNet(16, {}, CLASSES, SIDE, depths=ONE),
    "hornet_gf": lambda: HorNet(16, {2: (14, 8), 3: (7, 4)}, CLASSES, SIDE, depths=ONE),
    "l2vit": lambda: L2ViT(16, (2, 2, 1, 2), 2, CLASSES, SIDE),
    "rmt": lambda: RMT(
        RMTSize((16, 16, 32, 32), ONE, HEADS, ONE, (4, 4, 6, 6), 2, 3), CLASSES, SIDE
    ),
    "t2t_vit": lambda: T2TViT((32, 2, 4, 2), CLASSES, SIDE, performer=True),
    "t2t_vit_t": lambda: T2TViT((32, 2, 4, 2), CLASSES, SIDE, performer=False),
    "transnext": lambda: TransNeXt(16, ONE, 2, CLASSES, SIDE),
    "unireplknet": lambda: UniRepLKNet(16, ONE, (13,), CLASSES),
    "unireplknet_deployed": deployed_unireplknet,
    "vmamba": lambda: VMamba(ScanSize(16, ONE, 2), CLASSES),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_graph_and_file_compute_what_the_module_computes(name: str) -> None:
    torch.manual_seed(0)
    module = TINY[name]()
    make_testable(module, 1, SIDE)
    module.eval().requires_grad_(False)
    backbone = Backbone(
        name=name,
        module=module,
        preprocessing=Preprocessing(size=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3),
        weights=WeightsOrigin(kind="random", source="a test"),
        num_classes=CLASSES,
    )
    model = capture(backbone)
    assert model.dynamic_batch
    images = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        wanted = module(images)
    assert wanted.isfinite().all() and wanted.std(0).min() > 1e-3
    onnxruntime = import_onnxruntime()
    session = onnxruntime.InferenceSession(
        onnx_bytes(model.graph_module, backbone), providers=["CPUExecutionProvider"]
    )
    for batch in (1, 3):
        with torch.no_grad():
            assert sqnr_db(wanted[:batch], model.graph_module(images[:batch])) > 100
        (logits,) = session.run(None, {session.get_inputs()[0].name: images[:batch].numpy()})
        assert sqnr_db(wanted[:batch], torch.from_numpy(logits)) > 80
