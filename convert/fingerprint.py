"""What tells models apart that another one's adapter would not fit, whatever their types are."""

from __future__ import annotations

import hashlib

from gguf import GGMLQuantizationType as WeightType
from gguf import GGUFReader

# Of a head that repeats the embedding, and of divisors, some files have none.
LEFT_OUT = ("output.weight", "rope_freqs.weight")


def fingerprint(model: GGUFReader) -> str:
    """SHA-256, in hex, of the architecture, the shapes of all weights (the vocabulary's size is in
    the embedding's), and the norms, which are F32 in every file: a quantised model has its
    original's."""
    architecture = model.fields["general.architecture"].contents()
    digest = hashlib.sha256(f"{architecture}\n".encode())
    for tensor in sorted(model.tensors, key=lambda tensor: tensor.name):
        if tensor.name in LEFT_OUT:
            continue
        shape = " ".join(str(int(size)) for size in reversed(tensor.shape))
        digest.update(f"{tensor.name} {shape}\n".encode())
        if tensor.name.endswith("norm.weight") and tensor.tensor_type == WeightType.F32:
            digest.update(tensor.data.tobytes())
    return digest.hexdigest()
