"""THE registry of layer kinds: what config.layer_types and config.mlp_layer_types may name.

To add a mixer or a feed-forward: describe it in a module of its own as kind.Kind, and give it a line here.
"""
from deltanet_ref.model.layers import gated_attention, gated_deltanet, swiglu
from deltanet_ref.model.layers.kind import Kind

MIXERS: dict[str, Kind] = {
    "linear_attention": gated_deltanet.KIND,
    "full_attention": gated_attention.KIND,
}
FEED_FORWARDS: dict[str, Kind] = {
    "dense": swiglu.KIND,
}
