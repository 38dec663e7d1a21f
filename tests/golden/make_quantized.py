"""Make `quantized.npz`: what the library compressed-tensors makes of small random matrices.

Needs PyTorch and `compressed-tensors == 0.20.1`, which neither the package nor its tests need:

    python tests/golden/make_quantized.py

Of each case `CASE/original`, float32, and what the library's compressor stores of it with the library's scales (names
as in a checkpoint; FP8 as bytes, bfloat16 as float32), `CASE/config`, the JSON of its `weights` and its format, and
`CASE/decompressed`, what the library reads back, in the scale's dtype.
"""

import json
from pathlib import Path

import compressed_tensors
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

CASES = {
    "int4_groups": ("pack-quantized", (6, 160), torch.bfloat16, dict(num_bits=4, strategy="group", group_size=32)),
    "int4_groups_of_16": ("pack-quantized", (5, 48), torch.float16, dict(num_bits=4, strategy="group", group_size=16)),
    "int4_rows": ("pack-quantized", (3, 45), torch.float32, dict(num_bits=4, strategy="channel")),
    "int8_packed": ("pack-quantized", (3, 45), torch.bfloat16, dict(num_bits=8, strategy="channel")),
    "int8_groups": ("int-quantized", (4, 96), torch.float32, dict(num_bits=8, strategy="group", group_size=32)),
    "int8_rows": ("int-quantized", (7, 33), torch.bfloat16, dict(num_bits=8, strategy="channel")),
    "int8_tensor": ("naive-quantized", (7, 33), torch.float32, dict(num_bits=8, strategy="tensor")),
    "fp8_rows": ("float-quantized", (7, 33), torch.bfloat16, dict(num_bits=8, type="float", strategy="channel")),
    "fp8_tensor": ("float-quantized", (7, 33), torch.float32, dict(num_bits=8, type="float", strategy="tensor")),
    "fp8_blocks": (
        "float-quantized", (9, 32), torch.float32,
        dict(num_bits=8, type="float", strategy="block", block_structure=[4, 8]),
    ),
}  # fmt: skip


def peaks(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and greatest value of each part that has a scale."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "group":
        groups = weight.reshape(rows, columns // args.group_size, args.group_size)
        return groups.amin(2), groups.amax(2)
    r, c = args.block_structure
    padded = torch.nn.functional.pad(weight, (0, -columns % c, 0, -rows % r))
    blocks = padded.reshape(padded.shape[0] // r, r, padded.shape[1] // c, c)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def main() -> None:
    assert compressed_tensors.__version__ == "0.20.1"
    torch.manual_seed(0)
    arrays = {}
    for case, (form, shape, dtype, arguments) in CASES.items():
        args = QuantizationArgs(symmetric=True, **arguments)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        weight = 0.05 * torch.randn(shape)
        weight[0, :9] = 0
        scale, _ = calculate_qparams(*peaks(weight, args), args)
        scale = scale.to(dtype)
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress({"weight": weight, "weight_scale": scale.float()}, scheme)
        stored["weight_scale"] = scale
        arrays[f"{case}/original"] = weight.numpy()
        arrays[f"{case}/scale_dtype"] = np.array(str(dtype).removeprefix("torch."))
        arrays[f"{case}/config"] = np.array(json.dumps({"format": form, "weights": json.loads(args.model_dump_json())}))
        arrays[f"{case}/decompressed"] = as_numpy(compressor.decompress(stored, scheme)["weight"])
        arrays |= {f"{case}/{name}": as_numpy(tensor) for name, tensor in stored.items()}
    np.savez_compressed(Path(__file__).parent / "quantized.npz", **arrays)


if __name__ == "__main__":
    main()
