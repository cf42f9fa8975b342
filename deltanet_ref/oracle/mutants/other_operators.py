"""THE table of mistakes in the other operators: number in catalogue.py, title, and two ways to make it.

Each base is the operator's file in ops/ with the lines of oracle/operators.py that call it. The two ways are two sites.
"""
from deltanet_ref.oracle.mutants.edits import (Mistake, attention, becomes, conv, gate, gated_rms, l2, lora, loss, put,
                                               rms, rotary, swap)

ROW_0 = "({0} * (np.arange(len({0})) == 0).reshape(-1, 1, 1))"                             # zeros in the other rows

# ---- words of the convolution
WINDOW = "padded = np.concatenate([state[seq], x[row, span]], 1)  "
CONV, CONV_BACK = 'ops.causal_conv1d_forward(x["x"], x["w"], state=x["state"]', 'x["dy"], x["dstate_end"], cache)'
SEQUENCES = "for seq, row, span in _sequences(cu_seqlens, L):\n        padded = np.concatenate([state[seq]"
END, SILU = "state_end[seq] = padded[:, padded.shape[1] - (K - 1):]", "y = silu(c)"
SILU_BACK, END_BACK = "dc = silu_derivative(c)", "dpadded[:, dpadded.shape[1] - (K - 1):] += dstate_end[seq]"
TAPS_BACK = "dw += _correlate_backward_weight(dc[row, span], np.concatenate([state[seq], x[row, span]], 1))"
START_BACK = "dstate[seq], dx[row, span] = dpadded[:, :K - 1], dpadded[:, K - 1:]"
EARLIER = "np.concatenate([state[:len(x)], x], 1)[:, span.start:span.start + K - 1]"            # of whatever sequence

# ---- words of the gates
GATES = 'ops.decay_gate_forward(x["a"], x["b"], x["A_log"], x["dt_bias"])'
RATE, STEP, BETA = "A = np.exp(A_log.astype(wide))", "step = softplus(x)", "beta = sigmoid(b)  "
GATES_RETURN, GATES_TAKEN = "return g, beta, D", '{"g": g, "beta": beta,'
BETA_BACK, X_BACK = "db = dbeta * beta * (1 - beta)", "dx = -A * sigmoid(x) * dg"
RATE_BACK = "dA_log = (-A * (step * dg).sum(over_tokens)).astype(dg.dtype)"

# ---- words of the norms
L2, L2_SUM = 'x["x"], x["eps"]', 'r = np.einsum("...d,...d->...", x, x)[..., None]'
L2_ROOT, L2_ALONG, L2_BACK = "r += eps\n    np.divide(1, np.sqrt(r, out=r), out=r)", "dx = y * -", "dx *= r"
RMS, GATED = 'x["x"], x["w"], x["eps"]', 'x["x"], x["z"], x["w"], x["eps"]'
ROOT = "return np.divide(1, np.sqrt(r, out=r), out=r)"
RMS_ROW, RMS_WEIGHT, GATED_GATE = "y = x * r ", "y *= w", "y = silu(z) "
RMS_WEIGHT_BACK = '"nd,nd->d", _rows(dy), _rows(n)'
ALONG, ALONG_MEAN = "np.subtract(dn, n, out=n)", "mean = np.einsum"

# ---- words of the rotary embedding
ROPE, FREQUENCY = 'x["positions"], x["rotary_dim"], x["theta"], x["sections"]', "theta ** (-2 * j / rotary_dim)"
AXIS = "np.where((j % 3 == 1) & (j < 3 * sections[1]), 1, np.where((j % 3 == 2) & (j < 3 * sections[2]), 2, 0))"
ROPE_BACK = "return rope_forward(dy, cos, -sin)"
PAIRS = "first, second = x[..., :half], x[..., half:2 * half]"
NEIGHBOURS = "np.r_[0:2 * half:2, 1:2 * half:2, 2 * half:x.shape[3]]"

# ---- words of attention
ATTENTION, GATE = 'x["q"], x["k"], x["v"], scale=x["scale"]', 'ops.sigmoid_gate_forward(o, x["gate"])'
GROUP, VISIBLE = "slice(h * group, (h + 1) * group))", "slice(first, M - L + stop)"
SCORES, PEAK = "s = _times(q * scale, k.T)", "peak[queries] = s.real.max(-1)"
GATE_Y, GATED_Y = "y = sigmoid(gate)", "y *= o"
ATTENTION_BACK = "dq, dk, dv = ops.softmax_attention_backward(do, attention)"
MEAN, MEAN_TAKEN, SCALE_BACK = 'mean = np.einsum("blhd,blhd->blh", do, o)', "dP -= mean[queries]", "dP *= scale"
V_BACK, K_BACK = "_transposed_times(P, do[queries])", "_transposed_times(dP, q[queries])"
GATE_BACK, GATE_BACK_O = "dgate = 1 - s", "dgate *= do"

# ---- words of the cross-entropy
LABELS, KEPT = 'x["logits"], x["labels"]', "kept, count = kept_rows(labels, n, V, ignore_index, count)"
LARGEST, TOTAL_LOSS = "peak = logits.real.max(1, keepdims=True)", "loss = surprise.sum() / count"
LOSS_BACK = 'ops.cross_entropy_backward(x["dloss"]'
ROWS_BACK, LABEL_BACK = "kept[:, None], dloss / count / total, 0)", "-= dloss / count"

# ---- words of LoRA
UPDATE, SUM = "y = linear_forward(h, b)", 'y = ops.linear_forward(x["x"], x["w"]) + update'
LORA_BACK = 'dx, da, db = ops.lora_backward(x["dy"], cache)'
A_BACK, B_BACK = "da = linear_backward_weight(dh, x)", "db = linear_backward_weight(dy, h)"
LORA_X_BACK, LORA_X_SUM = "dx = linear_backward_input(dh, a)", '{"y": y, "dx": dx + '

FORWARD = (
    Mistake(1, "the convolution's window reaches into the sequence before",
            conv(swap(WINDOW, "state[seq]", EARLIER)),
            conv((SEQUENCES, f"last = []\n    {SEQUENCES}"), swap(WINDOW, "state[seq]", "(last or [state[seq]])[-1]"),
                 (END, f"{END}\n        last.append(state_end[seq].copy())"))),
    Mistake(4, "the convolution's state ignored",
            conv(becomes(CONV, state="None")), conv(swap(WINDOW, "state[seq]", "0 * state[seq]"))),
    Mistake(4, "the convolution's state newest first",
            conv(becomes(CONV, state="{0}[:, ::-1]")), conv(swap(WINDOW, "state[seq]", "state[seq][:, ::-1]"))),
    Mistake(4, "the convolution's final state without the one before",
            conv((END, "state_end[seq] = np.concatenate([0 * state[seq], x[row, span]], 1)[:, -(K - 1):]")),
            conv((END, f"{END}\n        state_end[seq, :max(K - 1 - (span.stop - span.start), 0)] = 0"))),
    Mistake(22, "no SiLU after the convolution", conv(put(SILU, "c")), conv(("return y, state", "return c, state"))),
    Mistake(22, "the taps of the convolution reversed",
            conv(becomes(CONV, w="{0}[:, ::-1]")), conv(("_correlate(padded, w) ", "_correlate(padded, w[:, ::-1]) "))),

    Mistake(5, "softplus overflows",
            gate((STEP, "step = np.log1p(np.exp(x.astype(np.float32)))")),
            gate(swap(GATES_RETURN, " g", " (-A * np.log1p(np.exp(x.astype(np.float32)))).astype(a.dtype)"))),
    Mistake(9, "-exp(A_log) exponentiated again",
            gate(put(RATE, "np.exp(-np.exp(A_log.astype(wide)))")), gate(becomes(GATES, A_log="-np.exp({0})"))),
    Mistake(9, "A_log not exponentiated",
            gate(put(RATE, "A_log.astype(wide)")), gate(swap(GATES_RETURN, " g", " (-A_log * step).astype(a.dtype)"))),
    Mistake(9, "A_log rounded to bfloat16",
            gate(becomes(GATES, A_log="bfloat16({0})")), gate(swap(RATE, "A_log", "bfloat16(A_log)"))),
    Mistake(22, "a and b swapped",
            gate(swap(GATES, 'x["a"], x["b"]', 'x["b"], x["a"]')),
            gate(swap(STEP, "(x)", "(b.astype(wide) + dt_bias)"), swap(BETA, "(b)", "(a)"))),
    Mistake(33, "g and beta returned in the other order",
            gate(swap(GATES_RETURN, "g, beta", "beta, g")), gate((GATES_TAKEN, '{"g": beta, "beta": g,'))),

    Mistake(8, "eps on the mean",
            l2(swap(L2_ROOT, "+= eps", "+= eps * x.shape[-1]")), l2(becomes(L2, eps='{0} * x["x"].shape[-1]'))),
    Mistake(8, "eps outside the root",
            l2((L2_ROOT, "r = 1 / (np.sqrt(r) + eps)")), l2((L2_ROOT, "r = 1 / np.maximum(np.sqrt(r), eps)"))),
    Mistake(8, "no eps", l2((L2_ROOT, "r = 1 / np.sqrt(r)")), l2(becomes(L2, eps="0"))),
    Mistake(8, "the mean in place of the sum",
            l2(swap(L2_SUM, "[..., None]", "[..., None] / x.shape[-1]")),
            l2((L2_ROOT, L2_ROOT.replace("eps", "eps * x.shape[-1]").replace("(1,", "(x.shape[-1] ** 0.5,")))),
    Mistake(21, "1 + w for w", rms(swap(RMS_WEIGHT, "w", "1 + w")), rms(becomes(RMS, w="(1 + {0})"))),
    Mistake(21, "no weight", rms((RMS_WEIGHT, "pass")), rms(becomes(RMS, w="np.ones_like({0})"))),
    Mistake(21, "rounded to bfloat16 before the weight",
            rms(put(RMS_ROW, "bfloat16({0}) ")), rms((RMS_WEIGHT, "y = bfloat16(y) * w"))),
    Mistake(21, "eps outside the root of the mean",
            rms((f"r += eps\n    {ROOT}", "return 1 / (np.sqrt(r) + eps)")),
            rms((f"r += eps\n    {ROOT}", "return 1 / np.maximum(np.sqrt(r), eps)"))),
    Mistake(21, "the sum in place of the mean",
            rms(("r /= d\n", "pass\n")),
            rms((f"r += eps\n    {ROOT}", f"r += eps / d\n    {ROOT.replace('(1,', '(d ** -0.5,')}"))),
    Mistake(21, "the gate before the norm",
            gated_rms((GATED_GATE, "x = x * silu(z)\n    r = _inverse_rms(x, w, eps)\n    y = np.ones_like(x) ")),
            gated_rms(("y *= x\n", "y *= x\n    r = _inverse_rms(y, w, eps)\n"))),
    Mistake(21, "a sigmoid for the gate's SiLU",
            gated_rms(put(GATED_GATE, "sigmoid(z) ")), gated_rms(put(GATED_GATE, "{0} / z "))),

    Mistake(30, "every feature rotated",
            rotary(becomes(ROPE, rotary_dim='x["x"].shape[-1]')),
            rotary(becomes(ROPE, rotary_dim='x["dy"].shape[-1]'))),
    Mistake(30, "frequencies of the whole head",
            rotary(becomes(ROPE, theta='{0} ** (x["rotary_dim"] / x["x"].shape[-1])')),
            rotary(("cos, sin = ops.rope_tables", 'cos, sin = (t[:, :x["rotary_dim"] // 2] for t in ops.rope_tables'),
                   becomes(ROPE, rotary_dim='x["x"].shape[-1]'), ('x["x"].dtype)', 'x["x"].dtype))'))),
    Mistake(30, "theta fixed to 10000",
            rotary(becomes(ROPE, theta="1e4")), rotary(swap(FREQUENCY, "theta", "1e4"))),
    Mistake(30, "neighbours as pairs",
            rotary((PAIRS, f"order = {NEIGHBOURS}\n    x = x[..., order]\n    {PAIRS}"),
                   ("return y\n", "return y[..., np.argsort(order)]\n")),
            rotary((PAIRS, "first, second = x[..., 0:2 * half:2], x[..., 1:2 * half:2]"),
                   ("return y\n", "y[..., 0:2 * half:2], y[..., 1:2 * half:2] = (first * cos - second * sin, "
                                  "first * sin + second * cos)\n    return y\n"))),
    Mistake(30, "the other direction",
            rotary(("np.sin(angle)", "-np.sin(angle)")), rotary(becomes(ROPE, positions="-{0}"))),
    Mistake(30, "one axis for all sections",
            rotary(becomes(ROPE, positions="({0} if {0}.ndim == 1 else {0}[0])")), rotary((AXIS, "0 * j"))),
    Mistake(30, "sections one after the other",
            rotary((AXIS, "np.repeat([0, 1, 2], sections)")),
            rotary((AXIS, "(j >= sections[0]) * 1 + (j >= sections[0] + sections[1])"))),

    Mistake(2, "query head h reads kv head h % H_kv",
            attention((GROUP, "slice(h, None, H_kv))")),
            attention(becomes(ATTENTION, k='np.tile({0}, (1, 1, x["q"].shape[2] // {0}.shape[2], 1))',
                              v='np.tile({0}, (1, 1, x["q"].shape[2] // {0}.shape[2], 1))'))),
    Mistake(4, "past keys left out of the causal mask",
            attention(swap(VISIBLE, "M - L + ")),
            attention(becomes(ATTENTION, k='{0}[:, :x["q"].shape[1]]', v='{0}[:, :x["q"].shape[1]]'))),
    Mistake(5, "softmax without the largest score taken off",
            attention(put(PEAK, "0")), attention(put(PEAK, "np.minimum({0}, 0)")), by="size"),
    Mistake(7, "no scale of the scores", attention(becomes(ATTENTION, scale="1")), attention(swap(SCORES, " * scale"))),
    Mistake(7, "scores scaled twice", attention(becomes(ATTENTION, scale="{0} ** 2")),
            attention(put(SCORES, "scale * {0}"))),
    Mistake(22, "no gate after attention",
            attention(becomes(GATE, gate="np.full_like({0}, 40)")), attention(put(GATE_Y, "np.ones_like(gate)"))),
    Mistake(22, "a SiLU for attention's gate",
            attention(put(GATE_Y, "{0} * gate")), attention(swap(GATED_Y, "o", "o * gate"))),

    Mistake(35, "ignored labels counted in the mean", loss((KEPT, f"{KEPT}\n    count = n")),
            loss(swap(TOTAL_LOSS, "count", "n"))),
    Mistake(35, "ignored labels read as label 0",
            loss(becomes(LABELS, labels="np.maximum({0}, 0)")),
            loss((KEPT, f"labels = np.maximum(labels, 0)\n    {KEPT}"))),
    Mistake(36, "nothing kept: 0 / 0",
            loss((KEPT, f"{KEPT}\n    count = kept.sum() * 1.0")), loss(swap(TOTAL_LOSS, "count", "len(surprise)"))),
    Mistake(36, "labels shifted once more",
            loss(becomes(LABELS, labels="np.roll({0}, -1)")),
            loss((KEPT, f"labels = np.r_[labels[1:], labels[0]]\n    {KEPT}"))),
    Mistake(5, "softmax without the largest logit taken off",
            loss(put(LARGEST, "0 * {0}")), loss(put(LARGEST, "np.minimum({0}, 0)")), by="size"),

    Mistake(24, "no update of the adapter", lora(put(UPDATE, "0 * {0}")), lora(swap(SUM, " + update"))),
)

BACKWARD = (
    Mistake(14, "dstate_end of the convolution ignored",
            conv(becomes(CONV_BACK, dstate_end="None")), conv((END_BACK, "pass"))),
    Mistake(14, "dstate of the convolution lost",
            conv(swap(START_BACK, "dpadded[:, :K - 1]", "0")), conv(('"dstate": dstate', '"dstate": 0 * dstate'))),
    Mistake(15, "dw of the convolution from row 0",
            conv(swap(TAPS_BACK, "dc[row, span]", ROW_0.format("dc[row, span]"))),
            conv(swap(TAPS_BACK, "dc[row, span], np.concatenate([state[seq], x[row, span]], 1)",
                      "dc[row, span][:1], np.concatenate([state[seq], x[row, span]], 1)[:1]"))),
    Mistake(16, "dw of the last sequence alone",
            conv(swap(TAPS_BACK, "+=", "=")), conv((TAPS_BACK, f"{TAPS_BACK} * (span.stop == L)"))),
    Mistake(16, "dw without the state", conv(swap(TAPS_BACK, "state[seq]", "0 * state[seq]")),
            conv(swap(CONV_BACK, "cache", "cache._replace(state=0 * cache.state)"))),
    Mistake(16, "the window's gradient reaches into the sequence before",
            conv((START_BACK, f"{START_BACK}\n        dx[row, max(span.start - K + 1, 0):span.start] += "
                              "dpadded[:, max(K - 1 - span.start, 0):K - 1]")),
            conv(("dx, dstate, dw = np.empty_like(x)", "dx, dstate, dw = np.zeros_like(x)"),
                 (START_BACK, "dstate[seq] = dpadded[:, :K - 1]\n        before = min(span.start, K - 1)\n        "
                              "dx[row, span.start - before:span.stop] += dpadded[:, K - 1 - before:]"))),
    Mistake(22, "no slope of the SiLU", conv(put(SILU_BACK, "np.ones_like(c)")), conv(put(SILU_BACK, "{0} ** 0"))),

    Mistake(9, "dA_log is the gradient of exp(A_log)",
            gate(swap(RATE_BACK, "-A * ", "-")), gate(put(RATE_BACK, "({0} / A).astype(dg.dtype)"))),
    Mistake(11, "db without the slope of the sigmoid",
            gate(swap(BETA_BACK, " * beta * (1 - beta)")), gate(('"db": db', '"db": x["dbeta"]'))),
    Mistake(11, "da without the slope of the softplus",
            gate(swap(X_BACK, " * sigmoid(x)")), gate(put(X_BACK, "{0} / sigmoid(x)"))),
    Mistake(15, "dA_log and ddt_bias of row 0",
            gate(swap(RATE_BACK, "(step * dg)", "(step * dg)[:1]"), ("dx.sum(", "dx[:1].sum(")),
            gate(swap(RATE_BACK, "* dg", f"* {ROW_0.format('dg')}"), ("dx.sum(", f"{ROW_0.format('dx')}.sum("))),

    Mistake(8, "0 / 0 at a zero row",
            l2((L2_BACK, "length = (y * y).sum(-1, keepdims=True)\n    dx *= r * length / length")),
            l2((L2_BACK, "length = np.sqrt((y * y).sum(-1, keepdims=True))\n    dx *= r / length * length"))),
    Mistake(11, "dx of the L2 norm not made orthogonal to y",
            l2(swap(L2_ALONG, "-", "0 * ")), l2((L2_BACK, "dx = r * dy"))),
    Mistake(11, "dx of the RMS norm not made orthogonal to x",
            rms((ALONG, "n = dn.copy()")), rms(swap(ALONG_MEAN, "np", "0 * np"))),
    Mistake(15, "dw of the RMS norm from row 0",
            rms(swap(RMS_WEIGHT_BACK, "_rows(dy), _rows(n)", "_rows(dy[:1]), _rows(n[:1])")),
            rms(swap(RMS_WEIGHT_BACK, "_rows(dy)", f"_rows({ROW_0.format('dy')})"))),
    Mistake(11, "dz without the slope of its sigmoid",
            gated_rms(("dz = 1 - s", "dz = 0 * s")), gated_rms(("dz *= gate", "dz *= 0"))),

    Mistake(30, "rotated again, not back",
            rotary(swap(ROPE_BACK, "-sin", "sin")), rotary(("ops.rope_backward(", "ops.rope_forward("))),

    Mistake(2, "one query head's gradient for its kv head",
            attention(swap(V_BACK, "P, do[queries]", "P[:, -1:], do[queries][:, -1:]"),
                      swap(K_BACK, "dP, q[queries]", "dP[:, -1:], q[queries][:, -1:]")),
            attention(swap(V_BACK, "P,", "P * (np.arange(P.shape[1]) == P.shape[1] - 1)[:, None],"),
                      swap(K_BACK, "dP,", "dP * (np.arange(P.shape[1]) == P.shape[1] - 1)[:, None],"))),
    Mistake(7, "no scale in the backward of attention",
            attention((SCALE_BACK, "pass")),
            attention((ATTENTION_BACK, f'{ATTENTION_BACK}\n    dq, dk = dq / x["scale"], dk / x["scale"]'))),
    Mistake(11, "dP without its mean", attention(put(MEAN, "0 * {0}")),
            attention(swap(MEAN_TAKEN, "mean", "0 * mean"))),
    Mistake(11, "dgate without the slope of the sigmoid",
            attention(put(GATE_BACK, "np.ones_like(s)")), attention((GATE_BACK_O, "dgate = do.copy()"))),

    Mistake(35, "ignored labels have a gradient",
            loss(swap(ROWS_BACK, "kept[:, None]", "True")), loss(swap(ROWS_BACK, ", 0)", ", dloss / count / total)"))),
    Mistake(35, "the gradient of a sum, not of a mean",
            loss(swap(ROWS_BACK, " / count"), swap(LABEL_BACK, " / count")),
            loss(becomes(LOSS_BACK, dloss='{0} * max((x["labels"] >= 0).sum(), 1)'))),

    Mistake(35, "the gradient of a mean over all rows",
            loss(swap(ROWS_BACK, "count", "len(labels)"), swap(LABEL_BACK, "count", "len(labels)")),
            loss(becomes(LOSS_BACK, dloss='{0} * max((x["labels"] >= 0).sum(), 1) / len(x["labels"])'))),

    Mistake(24, "the adapter's factors have no gradient",
            lora(put(A_BACK, "0 * {0}"), put(B_BACK, "0 * {0}")),
            lora((LORA_BACK, f"{LORA_BACK}\n    da, db = 0 * da, 0 * db"))),
    Mistake(11, "dx not through the adapter", lora(put(LORA_X_BACK, "0 * {0}")), lora(swap(LORA_X_SUM, "dx + "))),
)
