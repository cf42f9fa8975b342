"""The real llama.cpp (xllamacpp, in this process): log-probabilities of a GGUF file, adapters attached at run time."""

import json

import numpy as np
import xllamacpp as x

import deltanet_ref as dr


class Llama:
    """One model file and the adapter files that requests may scale; float32 KV cache, no flash attention."""

    def __init__(self, model, adapters=()):
        p = x.CommonParams()
        p.model.path, p.n_ctx, p.n_parallel, p.cpuparams.n_threads, p.warmup = str(model), 256, 1, 1, False
        p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.lora_adapters = [x.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
        self.adapters, self.server = len(adapters), x.Server(p)
        tokenizer = dr.load_tokenizer(model)
        self.vocabulary, (self.letter,) = tokenizer.vocab_size, tokenizer.encode("a")

    def log_probabilities(self, tokens, scales=()):
        """(vocabulary,) of the token after tokens, with one scale for each adapter.

        The reply is made a letter: one without text (half a character, a control token) comes without probabilities.
        Those reported are of the logits before that.
        """
        assert len(scales) == self.adapters
        out = self.server.handle_completions(
            {
                "prompt": [int(t) for t in tokens],
                "n_predict": 1,
                "temperature": -1.0,
                "n_probs": self.vocabulary,
                "logit_bias": [[self.letter, 1000.0]],
                "cache_prompt": False,
                "post_sampling_probs": False,
                "lora": [{"id": i, "scale": scale} for i, scale in enumerate(scales)],
            }
        )
        out = json.loads(out) if isinstance(out, str) else out
        row = np.full(self.vocabulary, np.nan)
        for entry in out["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        return row
