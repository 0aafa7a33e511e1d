"""Write a trained classifier as an ONNX folder that answers as the torch model does, or no folder at all.

    nlpxfer export runs/finetune runs/onnx --int8

Parity is measured on texts before the folder appears: float32 must hold to rounding, what int8 changes is reported.
`export.json` keeps the figures. See docs/export.md.
"""

from __future__ import annotations

from nlpxfer.export.folder import ExportRequest, export_classifier

__all__ = ["ExportRequest", "export_classifier"]
