"""Set Block Decoding training in torch. Imports neither the engine nor its bindings."""
