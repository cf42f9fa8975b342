"""THE table of mistakes in the gated delta rule: number in catalogue.py, title, and two ways to make it.

An edit is read as "these words become those". `rule` changes the recurrence, ops/gated_delta_rule/recurrent.py;
`chunks` the chunked form of oracle/chunk_by_chunk.py, `tokens` the same in chunks of one token; `wy_form` the chunked
form of ops. Words that are changed have a name.
"""
from deltanet_ref.oracle.mutants.edits import Mistake, becomes, chunks, put, rule, swap, tokens, wy_form

# ---- words of the recurrence
CALL = 'recurrent_forward(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], S0=x["S0"]'
SCALE = 'scale=x["scale"]'
HEAD_ORDER = 'x.get("head_order", "grouped")'
CU_SEQLENS = '{"cu_seqlens": x["cu_seqlens"]}'
RETURN = "(o, S_end, *gradients)"
BACK = 'gradients = gdr.recurrent_backward(x["do"], x["dS_end"], cache)'
KEY_HEADS = "args.q[:, args.key_head], args.k[:, args.key_head]  "
SHARED = "x[:, heads].sum(1)"
ENTERS = "S = args.S0[n]"
ENTERS_BACK = "enumerate(zip(args.cu_seqlens, args.cu_seqlens[1:])):\n        dS = dS_end[n]"
DECAY = "S = np.exp(g)[..., None, None] * S  "
ERROR = "u = beta[..., None] * (v - _read(k, S))"
WRITE = "S = S + _outer(k, u)"
READ = "o = scale * _read(q, S)"
PRODUCT = "(x[..., None, :] @ S)"
READ_BACK = "dq = scale * _read(do, _t(S_decayed + _outer(k, u)))"
WRITE_BACK = "dk = _read(u, _t(dS))"
ERROR_BACK = "dbeta = (du * error).sum(-1)"
KEY_ERASES, STATE_ERASES = "dk = dk - _read(dv, _t(S_decayed))", "dS = dS - _outer(k, dv)"
DECAY_GRADIENT, DECAY_BACK = "dg = (dS * S_decayed).sum((-2, -1))", "dS = np.exp(g)[..., None, None] * dS"
TOKEN_BACK, START_BACK = "dq[t], dk[t], dv[t], dg[t], dbeta[t], dS = token_backward(", "dS0[n] = dS"
TOKEN_RETURN = "return dq, dk, dv, dg, dbeta, dS"

# ---- words of the chunked form of the oracle
C_SEQUENCES = 'enumerate(zip(x["cu_seqlens"], x["cu_seqlens"][1:]))'
C_STATES = '{name: x[name][n:n + 1] for name in ("S0", "dS_end")}'
C_KEY_HEADS = 'q, k = x["q"][:, :, heads], x["k"][:, :, heads]'
C_OPERAND = "operand=lambda x: x"
C_START = 'S = x["S0"]'
C_ROWS = '(q, k, x["v"], x["g"], x["beta"])'
C_LENGTH = "b, C = beta[..., None], g.shape[2]"
C_CUMSUM = "gc = np.cumsum(g, -1, dtype=dtype)"
C_GAMMA = "np.exp(np.where(np.tri(C, dtype=bool), gc[..., :, None] - gc[..., None, :], -np.inf).astype(dtype))"
C_A = "A = np.tril(b * gram * Gamma, -1)"
C_T = "T = _solved(A)"
C_TAIL, C_WHOLE = "np.exp(gc[..., -1:] - gc)[..., None]", "whole = np.exp(gc[..., -1])[..., None, None]"
C_UW = "U, W = dot(T, b * V), dot(T, b * decay * K)"
C_V_NEW = "V_new = U - dot(W, S)"
C_P = "P = QK * Gamma"
C_O = 'o = x["scale"] * (dot(decay * Q, S) + dot(P, V_new))'
C_PUT = "V_new=V_new, o=o)"
C_S = "S = whole * S + dot(_t(tail * K), V_new)"
C_END = 'out["S_end"] = S'
C_END_BACK = 'dS = x["dS_end"]'
C_KEPT = "QK, P, S = kept[n]"
C_DO = 'do = np.asarray(x["scale"] * x["do"]'
C_DV_NEW = "dV_new = dot(_t(P), do) + dot(tail * K, dS)"
C_DQ = "dQ = decay * d_decay_Q + dot(dP * Gamma, K)"
C_DK = "dK = dot(_t(dP * Gamma), Q) + tail * d_tail_K"
C_DW = "dU, dW = dV_new, -dot(dV_new, _t(S))"
C_DS = "dS = whole * dS + dot(_t(decay * Q), do) - dot(_t(W), dV_new)"
C_DV = "dV = b * d_bV"
C_DK_OF_W = "dK = dK + b * decay * d_bK"
C_DT = "dT = np.tril(dot(dU, _t(b * V)) + dot(dW, _t(b * decay * K)))"
C_DP = "dP = np.tril(dot(do, _t(V_new)))"
C_DA = "dA = -np.tril(dot(_t(T), dot(dT, _t(T))), -1)"
C_DK_OF_A = "dK = dK + dot(dgram + _t(dgram), K)"
C_DBETA = "dbeta = (d_bV * V).sum(-1) + (d_bK * decay * K).sum(-1) + (dA * gram * Gamma).sum(-1)"
C_PAIR = "pair = dP * P + dA * A"
C_DGC = "dgc = pair.sum(-1) - pair.sum(-2) + (decay * d_decay_Q * Q).sum(-1) + (d_bK * b * decay * K).sum(-1) - d_tail"
C_LAST_DGC = "dgc[..., -1] += d_tail.sum(-1) + d_whole"
C_DG = "dg = np.flip(np.cumsum(np.flip(dgc, -1), -1, dtype=dtype), -1)"
C_G_BACK = 'x["g"][:, t].swapaxes(1, 2)'
C_PUT_BACK = "dq=dQ, dk=dK, dv=dV, dg=dg, dbeta=dbeta)"
C_START_BACK = 'out["dS0"] = dS'
C_SHARED = "out[name][:, :, key_head] += per_value_head[:, :, h]"

# ---- words of the chunked form of ops
W_CALL = "wy = wy_forward(K, V, G, Beta)"
W_ENTERS = "S[chunk] = S_now[sequence]\n"
W_GAMMA = "return np.exp(exponent.astype(dtype))"
W_A = "A = np.tril(beta[..., None] * (k @ _t(k)) * Gamma, -1)"
W_T = "T = unit_lower_inverse(A)"
W_U, W_W = "U = T @ (beta[..., None] * v)", "W = T @ (beta[..., None] * decay_from_start(gc, k.dtype) * k)"
W_V_NEW = "wy.U[chunk] - wy.W[chunk] @ S[chunk]"
W_P = "P = (Q @ _t(K)) * wy.Gamma"
W_READ = "(decay_from_start(wy.gc, Q.dtype) * Q) @ S"
W_PUT = "o = scatter(o, chunks, len(args.v))"
W_S = "decay_whole[chunk] * S[chunk] + _t(K_tail[chunk]) @ V_new[chunk]"
W_TAIL, W_TAIL_K = "np.exp(gc[..., -1:] - gc).astype(K.dtype)[..., None]", "return to_end * K"
W_DECAYS, W_DECAYS_BACK = "_decays(K, wy.gc)\n    S = np.empty", "_decays(K, wy.gc)\n    decay = decay_from"
W_QK_BACK = "Q, K = (gather(x[:, args.key_head], chunks) for x in (args.q, args.k))\n    V, Beta, dO"
W_D_SCORES = "dP = np.tril(dO @ _t(V_new))"
W_DP, W_DPK = "dQK = dP * wy.Gamma", "dA_Gamma = dA * wy.Gamma"
W_DV_NEW, W_DV_NEW_TAIL = "dV_new = _t(QK * wy.Gamma) @ dO", "dV_new[chunk] += K_tail[chunk] @ dS_after[chunk]"
W_DS_READ = "dS_read = _t(decay * Q) @ dO"
W_DQ = "dQ += dQK @ K"
W_DK, W_DK_TAIL = "dK = _t(dQK) @ Q", "dK += np.exp(wy.gc[..., -1:] - wy.gc).astype(K.dtype)[..., None] * dK_tail"
W_DS = "decay_whole[chunk] * dS_after[chunk] + dS_read[chunk] - _t(wy.W[chunk]) @ dV_new[chunk]"
W_DW = "wy_backward(dV_new, -dV_new @ _t(S), K, V, Beta, wy)"
W_DA = "dA = -np.tril(dX_U @ _t(wy.U) + dX_W @ _t(wy.W), -1)"
W_DK_OF_A = "dk += (dGram + _t(dGram)) @ k"
W_DBETA = "dbeta = (dX_U * v).sum(-1) + (dX_W * decay * k).sum(-1)"
W_DBETA_OF_A = "dbeta += (dA_Gamma * (k @ _t(k))).sum(-1)"
W_DG = "log_decay_backward(pair + pair_wy, row + row_wy, tail, whole)"
W_PUT_BACK = "(scatter(x, chunks, len(args.v))"

# ---- what becomes of an array
AS_VK = "{0}.reshape(*{0}.shape[:2], {0}.shape[3], {0}.shape[2]).swapaxes(2, 3)"          # memory of a (d_v, d_k)
OF_VK = "{0}.swapaxes(2, 3).reshape({0}.shape)"                                            # memory for a (d_v, d_k)
ROW_0 = "np.broadcast_to({0}[:1], {0}.shape)"
ONLY_ROW_0 = "{0} * (np.arange(len({0})) == 0).reshape(-1, *(1,) * ({0}.ndim - 1))"
UNIT = "{0} / np.sqrt(({0} ** 2).sum(-1, keepdims=True) + 1e-6)"
BARE_UNIT = "{0} / np.sqrt(({0} ** 2).sum(-1, keepdims=True))"
BF16, FP16 = "bfloat16({0})", "({0}).astype(np.float16).astype(np.float32)"
CUT = "(np.float32({0}).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)"
PRODUCT_OF_EXPS = "np.tril(np.exp({0})[..., :, None] * np.exp(-{0})[..., None, :])"
FULL = "chunks.filled.all(1).reshape(-1, 1, 1, 1)"                                         # False: a short chunk


def returns(o="o", S_end="S_end", gradients="*gradients"):
    """The recurrence with other answers."""
    return RETURN, f"({o}, {S_end}, {gradients})"


FORWARD = (
    Mistake(1, "the state goes on into the next sequence",
            rule((ENTERS, "S = S if n and args.batch[0] == 1 else args.S0[n]")),
            chunks((C_STATES, '{"S0": parts[-1]["S_end"] if n else x["S0"][:1], "dS_end": x["dS_end"][n:n + 1]}'))),
    Mistake(1, "the final state is added to the next initial state",
            rule((ENTERS, "S = args.S0[n] + (S if n and args.batch[0] == 1 else 0)")),
            chunks((C_STATES, '{"S0": x["S0"][n:n + 1] + (parts[-1]["S_end"] if n else 0), '
                              '"dS_end": x["dS_end"][n:n + 1]}'))),
    Mistake(1, "sequences begin a token late",
            rule((CU_SEQLENS, '{"cu_seqlens": np.r_[0, x["cu_seqlens"][1:-1] + 1, x["cu_seqlens"][-1]]}')),
            chunks((C_SEQUENCES, 'enumerate(zip([0, *x["cu_seqlens"][1:-1] + 1], '
                                 '[*x["cu_seqlens"][1:-1] + 1, x["cu_seqlens"][-1]]))'))),

    Mistake(2, "value head h reads key head h % H_k", rule((HEAD_ORDER, '"tiled"')), chunks((HEAD_ORDER, '"tiled"'))),
    Mistake(2, "every value head reads the first key head",
            rule(("key_head = value", "key_head = 0 * value")), chunks(("heads = value", "heads = 0 * value"))),
    Mistake(2, "q, but not k, of key head h % H_k",
            rule(swap(KEY_HEADS, "q[:, args.key_head]", "q[:, np.arange(len(args.key_head)) % args.q.shape[1]]")),
            chunks(swap(C_KEY_HEADS, '["q"][:, :, heads]', '["q"][:, :, np.arange(H_v) % x["q"].shape[2]]'))),

    Mistake(3, "S0 read as (d_v, d_k)", rule(becomes(CALL, S0=AS_VK)), chunks(becomes(C_START, S0=AS_VK))),
    Mistake(3, "S0 stored as (d_v, d_k), read as (d_k, d_v)",
            rule(becomes(CALL, S0=OF_VK)), chunks(becomes(C_START, S0=OF_VK))),
    Mistake(3, "S_end stored as (d_v, d_k)", rule(returns(S_end=OF_VK.format("S_end"))), chunks(put(C_END, OF_VK))),
    Mistake(3, "S_end read as (d_v, d_k)", rule(returns(S_end=AS_VK.format("S_end"))), chunks(put(C_END, AS_VK))),
    Mistake(3, "S0 read and S_end stored as (d_v, d_k)",
            rule(becomes(CALL, S0=AS_VK), returns(S_end=OF_VK.format("S_end"))),
            chunks(becomes(C_START, S0=AS_VK), put(C_END, OF_VK))),
    Mistake(3, "S_end returned as (d_v, d_k)",
            rule(returns(S_end="S_end.swapaxes(2, 3)")), chunks(put(C_END, "{0}.swapaxes(2, 3)"))),

    Mistake(4, "S0 ignored", rule(becomes(CALL, S0="None")), chunks(becomes(C_START, S0="0 * {0}"))),
    Mistake(4, "the state forgotten at every chunk",
            chunks((C_LENGTH, "b, C, S = beta[..., None], g.shape[2], S * (n == 0)")),
            wy_form((W_ENTERS, "S[chunk] = S_now[sequence] = S_now[sequence] * (chunk[0] == 0)\n"))),
    Mistake(4, "the state reset to S0 at every chunk",
            chunks((C_LENGTH, 'b, C, S = beta[..., None], g.shape[2], x["S0"]')),
            wy_form((W_ENTERS, "S[chunk] = args.S0[sequence]\n"))),
    Mistake(4, "every row starts from the S0 of row 0",
            rule((ENTERS, "S = args.S0[0]")),
            chunks(becomes(C_START, S0=ROW_0), (C_STATES, '{"S0": x["S0"][:1], "dS_end": x["dS_end"][n:n + 1]}'))),
    Mistake(4, "S0 of the next head",
            rule(becomes(CALL, S0="np.roll({0}, 1, 1)")), chunks(becomes(C_START, S0="np.roll({0}, 1, 1)"))),

    Mistake(5, "exp(gc_i) times exp(-gc_j)", chunks((C_GAMMA, PRODUCT_OF_EXPS.format("gc"))),
            wy_form((W_GAMMA, f"return {PRODUCT_OF_EXPS.format('gc.astype(dtype)')}")), by="size"),
    Mistake(5, "exp above the diagonal, masked by a product",
            chunks((C_GAMMA, "np.exp(gc[..., :, None] - gc[..., None, :]) * np.tri(C, dtype=dtype)")),
            wy_form((W_GAMMA, "return np.exp((gc[..., :, None] - gc[..., None, :]).astype(dtype)) * np.tri(C)")),
            by="size"),
    Mistake(5, "exp(gc_C) divided by exp(gc_j)",
            chunks((C_TAIL, "np.exp(gc[..., -1:, None]) / np.exp(gc)[..., None]")),
            wy_form((W_TAIL, "np.exp(gc[..., -1:, None]).astype(K.dtype) / np.exp(gc).astype(K.dtype)[..., None]")),
            by="size"),
    Mistake(5, "log decays clamped at -10",
            rule(becomes(CALL, g="np.maximum({0}, -10)")), chunks(becomes(C_ROWS, g="np.maximum({0}, -10)"))),

    Mistake(7, "no scale", rule(swap(READ, "scale * ")), chunks(swap(C_O, 'x["scale"] * '))),
    Mistake(7, "scale twice", rule(put(READ, "scale * {0}")), chunks(becomes(C_O, scale="{0} ** 2"))),
    Mistake(7, "scale fixed to d_k ** -0.5",
            rule(becomes(SCALE, scale="None")), chunks(becomes(C_O, scale="Q.shape[-1] ** -0.5"))),
    Mistake(7, "scale fixed to d_v ** -0.5",
            rule(becomes(SCALE, scale='x["v"].shape[-1] ** -0.5')), chunks(becomes(C_O, scale="V.shape[-1] ** -0.5"))),
    Mistake(7, "scale in the state's part of o alone",
            chunks(swap(C_O, "dot(P, V_new)", 'dot(P, V_new) / x["scale"]')), wy_form(put(W_P, "{0} / args.scale"))),

    Mistake(8, "keys normalised inside", rule(becomes(CALL, k=UNIT)), chunks(becomes(C_KEY_HEADS, k=f"({UNIT})"))),
    Mistake(8, "q and k normalised inside",
            rule(becomes(CALL, q=UNIT, k=UNIT)), chunks(becomes(C_KEY_HEADS, q=f"({UNIT})", k=f"({UNIT})"))),
    Mistake(8, "keys normalised inside, 0 / 0 for a zero key",
            rule(becomes(CALL, k=BARE_UNIT)), chunks(becomes(C_KEY_HEADS, k=f"({BARE_UNIT})"))),

    Mistake(10, "A without Gamma", chunks(swap(C_A, " * Gamma")), wy_form(swap(W_A, " * Gamma"))),
    Mistake(10, "A without beta", chunks(swap(C_A, "b * ")), wy_form(swap(W_A, "beta[..., None] * "))),
    Mistake(10, "A_ij with beta_j",
            chunks(swap(C_A, "b *", "_t(b) *")), wy_form(swap(W_A, "beta[..., None]", "beta[..., None, :]"))),
    Mistake(10, "A with its diagonal",
            chunks(swap(C_A, ", -1"), put(C_T, "np.linalg.inv(np.eye(C, dtype=dtype) + A)")),
            wy_form(swap(W_A, ", -1"), put(W_T, "np.linalg.inv(np.eye(A.shape[-1], dtype=A.dtype) + A)"))),
    Mistake(10, "(I - A)^-1", chunks(swap(C_T, "(A)", "(-A)")), wy_form(swap(W_T, "(A)", "(-A)"))),
    Mistake(10, "no T", chunks(swap(C_T, "(A)", "(0 * A)")), wy_form(swap(W_T, "(A)", "(0 * A)"))),
    Mistake(10, "I - A for T", chunks(swap(C_T, "(A)", "(0 * A) - A")), wy_form(swap(W_T, "(A)", "(0 * A) - A"))),
    Mistake(10, "U without beta", chunks(swap(C_UW, "b * V", "V")), wy_form(swap(W_U, "beta[..., None] * "))),
    Mistake(10, "W without beta", chunks(swap(C_UW, "b * decay", "decay")), wy_form(swap(W_W, "beta[..., None] * "))),
    Mistake(10, "W without its decay",
            chunks(swap(C_UW, "decay * ")), wy_form(swap(W_W, "decay_from_start(gc, k.dtype) * "))),
    Mistake(10, "V_new = U + W S", chunks(swap(C_V_NEW, "-", "+")), wy_form(swap(W_V_NEW, "-", "+"))),
    Mistake(10, "V_new = U", chunks(swap(C_V_NEW, " - dot(W, S)")),
            wy_form(swap(W_V_NEW, " - wy.W[chunk] @ S[chunk]"))),
    Mistake(10, "scores with a 0/1 mask for Gamma",
            chunks((C_P, "P = np.tril(QK)")), wy_form((W_P, "P = np.tril(Q @ _t(K))"))),
    Mistake(10, "scores strictly below the diagonal",
            chunks(put(C_P, "np.tril({0}, -1)")), wy_form(put(W_P, "np.tril({0}, -1)"))),
    Mistake(10, "scores without a mask",
            chunks(swap(C_P, "Gamma", "np.maximum(Gamma, _t(Gamma))")),
            wy_form(swap(W_P, "wy.Gamma", "np.maximum(wy.Gamma, _t(wy.Gamma))"))),

    Mistake(12, "g = 0 taken for no g, its memory left as it was",
            rule(becomes(CALL, g="({0} if {0}.any() else {0} - 100)")),
            chunks(becomes(C_ROWS, g="({0} if {0}.any() else {0} - dtype.type(0.7))")), by="size"),

    Mistake(13, "o of a short chunk not written",
            chunks(swap(C_PUT, "o=o", "o=o * (C == chunk)")), wy_form(swap(W_PUT, "(o", f"(o * {FULL}"))),
    Mistake(13, "o of a short chunk not written, NaN in its memory",
            chunks(swap(C_PUT, "o=o", "o=o if C == chunk else o * np.nan")),
            wy_form(swap(W_PUT, "(o", f"(np.where({FULL}, o, np.nan)"))),
    Mistake(13, "the last gate of a short chunk read from its padding",
            chunks(swap(C_TAIL, "-1:]", "-1:] * (C == chunk)"), swap(C_WHOLE, "-1]", "-1] * (C == chunk)")),
            wy_form(swap(W_DECAYS, "wy.gc", "wy.gc * chunks.filled[:, None]"))),
    Mistake(13, "a short chunk does not reach the state",
            chunks(put(C_S, "{0} if C == chunk else S")),
            wy_form((W_S, f"np.where(({FULL})[chunk], {W_S}, S[chunk])"))),

    Mistake(15, "gates of row 0 for every row",
            rule(becomes(CALL, g=ROW_0, beta=ROW_0)), chunks(becomes(C_ROWS, g=ROW_0, beta=ROW_0))),
    Mistake(15, "keys of row 0 for every row",
            rule(becomes(CALL, k=ROW_0)), chunks(becomes(C_KEY_HEADS, k=ROW_0))),
    Mistake(15, "only row 0 is computed",
            rule(returns(ONLY_ROW_0.format("o"), ONLY_ROW_0.format("S_end"))),
            chunks(swap(C_PUT, "o=o", f"o={ONLY_ROW_0.format('o')}"), put(C_END, ONLY_ROW_0))),

    Mistake(17, "padding writes", rule(becomes(CALL, beta="np.where({0} == 0, 1, {0})")),
            chunks(becomes(C_ROWS, beta="np.where({0} == 0, dtype.type(0.5), {0})")), by="size"),
    Mistake(17, "padding decays", rule(becomes(CALL, g='np.where(x["beta"] == 0, -1, {0})')),
            chunks(becomes(C_ROWS, g='np.where(x["beta"] == 0, dtype.type(-0.5), {0})')), by="size"),

    Mistake(18, "state in bfloat16 after every token", rule(put(WRITE, BF16)), tokens(put(C_S, BF16)), by="size"),
    Mistake(18, "state in float16 after every token", rule(put(WRITE, FP16)), tokens(put(C_S, FP16)), by="size"),
    Mistake(18, "state cut to bfloat16, not rounded, after every token",
            rule(put(WRITE, CUT)), tokens(put(C_S, CUT)), by="size"),
    Mistake(18, "state in bfloat16 after every chunk",
            chunks(put(C_S, BF16)), wy_form((W_S, BF16.format(W_S))), by="size"),
    Mistake(18, "state in float16 after every chunk",
            chunks(put(C_S, FP16)), wy_form((W_S, FP16.format(W_S))), by="size"),

    Mistake(18, "state in bfloat16 between chunks",
            chunks((C_LENGTH, f"{C_LENGTH}\n        S = S if n == 0 else {BF16.format('S')}")),
            wy_form((W_ENTERS, f"S[chunk] = S_now[sequence] if chunk[0] == 0 else {BF16.format('S_now[sequence]')}\n")),
            by="size"),
    Mistake(18, "state in float16 between chunks",
            chunks((C_LENGTH, f"{C_LENGTH}\n        S = S if n == 0 else {FP16.format('S')}")),
            wy_form((W_ENTERS, f"S[chunk] = S_now[sequence] if chunk[0] == 0 else {FP16.format('S_now[sequence]')}\n")),
            by="size"),

    Mistake(19, "TF32 in every product",
            chunks(swap(C_OPERAND, "lambda x: x", "tf32")),
            rule((PRODUCT, "(tf32(x[..., None, :]) @ tf32(S))"), swap(WRITE, "(k, u)", "(tf32(k), tf32(u))")),
            by="size"),
    Mistake(19, "bfloat16 in every product",
            chunks(swap(C_OPERAND, "lambda x: x", "bfloat16")),
            rule((PRODUCT, "(bfloat16(x[..., None, :]) @ bfloat16(S))"),
                 swap(WRITE, "(k, u)", "(bfloat16(k), bfloat16(u))")), by="size"),

    Mistake(20, "T by squaring", chunks((C_T, "T = inverse_by_squaring(A, C)")),
            wy_form((W_T, "T = inverse_by_squaring(A, A.shape[-1])")), by="size"),
    Mistake(20, "T by too few squarings", chunks((C_T, "T = inverse_by_squaring(A, 8)")),
            wy_form((W_T, "T = inverse_by_squaring(A, 8)"))),

    Mistake(27, "beta at most 1",
            rule(becomes(CALL, beta="np.minimum({0}, 1)")), chunks(becomes(C_ROWS, beta="np.minimum({0}, 1)"))),
    Mistake(27, "beta kept below 1", rule(becomes(CALL, beta="np.minimum({0}, np.float32(0.99))")),
            chunks(becomes(C_ROWS, beta="np.minimum({0}, dtype.type(0.98))")), by="size"),

    Mistake(28, "error measured before the decay",
            rule((DECAY, f"before, S = S, {DECAY[4:]}"), swap(ERROR, "S)", "before)")),
            chunks((C_A, "A = np.tril(b * gram * np.exp(np.minimum((gc - g)[..., None] - gc[..., None, :], 0)), -1)"),
                   swap(C_UW, "decay", "np.exp(gc - g)[..., None]"))),
    Mistake(28, "output read before the write",
            rule((WRITE, f"before, S = S, {WRITE[4:]}"), swap(READ, "S)", "before)")),
            chunks(put(C_P, "np.tril({0}, -1)"))),
    Mistake(28, "output read before the decay",
            rule((DECAY, f"before, S = S, {DECAY[4:]}"), swap(READ, "S)", "before)")),
            tokens((C_O, 'o = x["scale"] * dot(Q, S)'))),
    Mistake(28, "decay after the write",
            rule((DECAY, "S = S"), (WRITE, "S = np.exp(g)[..., None, None] * (S + _outer(k, u))")),
            tokens(swap(C_UW, "decay * "), swap(C_O, "dot(P", "decay * dot(P"), swap(C_S, "tail", "decay"))),

    Mistake(29, "the decay not carried to the next chunk",
            chunks(swap(C_S, "whole * ")), wy_form(swap(W_S, "decay_whole[chunk] * "))),
    Mistake(29, "the sum of log decays not reset at a chunk",
            chunks((C_CUMSUM, 'gc = np.cumsum(x["g"], 1, dtype=dtype)[:, t].swapaxes(1, 2)')),
            wy_form((W_CALL, "G[..., 0] += gather(np.concatenate([np.cumsum(args.g[a:b], 0) - args.g[a:b] for a, b in "
                             f"zip(args.cu_seqlens, args.cu_seqlens[1:])]), chunks)[..., 0]\n    {W_CALL}"))),
    Mistake(29, "o reads the state before the chunk without its decay",
            chunks(swap(C_O, "decay * ")), wy_form((W_READ, "Q @ S"))),
    Mistake(29, "what a chunk writes does not decay to its end",
            chunks(swap(C_S, "tail * ")), wy_form((W_TAIL_K, "return K"))),
    Mistake(29, "the first gate of a chunk left out",
            chunks(put(C_CUMSUM, "{0} - g[..., :1]")), wy_form((W_CALL, f"G[..., 0] = 0\n    {W_CALL}"))),
    Mistake(29, "no decay at all", rule(becomes(CALL, g="0 * {0}")), chunks(becomes(C_ROWS, g="0 * {0}"))),

    Mistake(33, "g and beta swapped",
            rule(swap(CALL, 'g=x["g"], beta=x["beta"]', 'g=x["beta"], beta=x["g"]')),
            chunks(swap(C_ROWS, 'x["g"], x["beta"]', 'x["beta"], x["g"]'))),

    Mistake(34, "beta rounded to bfloat16",
            rule(becomes(CALL, beta=BF16)), chunks(becomes(C_ROWS, beta=BF16))),
    Mistake(34, "g rounded to bfloat16", rule(becomes(CALL, g=BF16)), chunks(becomes(C_ROWS, g=BF16))),
    Mistake(34, "beta rounded to float16", rule(becomes(CALL, beta=FP16)), chunks(becomes(C_ROWS, beta=FP16))),
    Mistake(34, "g rounded to float16", rule(becomes(CALL, g=FP16)), chunks(becomes(C_ROWS, g=FP16))),
    Mistake(34, "exp(g) rounded to bfloat16",
            rule(swap(DECAY, "np.exp(g)", "bfloat16(np.exp(g))")),
            tokens(put(C_CUMSUM, "np.maximum(np.log(bfloat16(np.exp({0}))), -200)"))),
)

BACKWARD = (
    Mistake(1, "the gradient of the state goes on into the sequence before",
            rule((ENTERS_BACK, "reversed([*enumerate(zip(args.cu_seqlens, args.cu_seqlens[1:]))]):\n        "
                  "dS = dS_end[n] + (dS if args.batch[0] == 1 and n + 1 < len(dS_end) else 0)")),
            chunks((C_SEQUENCES, f"reversed([*{C_SEQUENCES}])"), ("parts.append(", "parts.insert(0, "),
                   (C_STATES, '{"S0": x["S0"][n:n + 1], "dS_end": x["dS_end"][n:n + 1] + '
                              '(parts[0]["dS0"] if parts else 0)}'))),

    Mistake(2, "one value head's gradient for its key head",
            rule((SHARED, "x[:, heads][:, -1]")), chunks(swap(C_SHARED, "+=", "="))),
    Mistake(2, "the first value head's gradient for its key head",
            rule((SHARED, "x[:, heads][:, 0]")), chunks((C_SHARED, f"{C_SHARED} * (h == list(heads).index(key_head))"))),
    Mistake(2, "the mean over the value heads of a key head",
            rule((SHARED, "x[:, heads].mean(1)")), chunks((C_SHARED, f"{C_SHARED} * x['k'].shape[2] / H_v"))),

    Mistake(3, "dS_end read as (d_v, d_k)",
            rule(becomes(BACK, dS_end=AS_VK)), chunks(becomes(C_END_BACK, dS_end=AS_VK))),
    Mistake(3, "dS0 stored as (d_v, d_k)",
            rule(returns(gradients=f"*gradients[:5], {OF_VK.format('gradients[5]')}")),
            chunks(put(C_START_BACK, OF_VK))),

    Mistake(5, "exp(gc_i) times exp(-gc_j) in the backward",
            chunks((C_KEPT, f"{C_KEPT}\n        Gamma = {PRODUCT_OF_EXPS.format('gc')}"),
                   swap(C_PAIR, "P +", "QK * Gamma +")),
            wy_form(swap(W_DP, "wy.Gamma", PRODUCT_OF_EXPS.format("wy.gc.astype(K.dtype)")),
                    swap(W_DPK, "wy.Gamma", PRODUCT_OF_EXPS.format("wy.gc.astype(k.dtype)"))), by="size"),

    Mistake(6, "dg divided by a decay that has vanished",
            rule(put(DECAY_GRADIENT, "np.exp(g) * {0} / np.exp(g)")),
            chunks(put(C_DG, f"np.exp({C_G_BACK}) * {{0}} / np.exp({C_G_BACK})")), by="size"),
    Mistake(6, "dg is the gradient of exp(g)",
            rule(swap(DECAY_GRADIENT, "S_decayed", "S")), chunks(put(C_DG, f"{{0}} * np.exp(-{C_G_BACK})"))),
    Mistake(6, "dg summed from what was rounded to bfloat16",
            chunks(swap(C_DG, "np.flip(dgc, -1)", "bfloat16(np.flip(dgc, -1))")),
            wy_form((W_DG, "log_decay_backward(*map(bfloat16, (pair + pair_wy, row + row_wy, tail, whole)))")),
            by="size"),

    Mistake(7, "dq without scale", rule(swap(READ_BACK, "scale * ")), chunks(put(C_DQ, '{0} / x["scale"]'))),
    Mistake(7, "dq with scale twice", rule(put(READ_BACK, "scale * {0}")), chunks(put(C_DQ, '{0} * x["scale"]'))),
    Mistake(7, "no scale but in dq",
            rule(("_outer(q, scale * do)", "_outer(q, do)")),
            chunks(swap(C_DO, 'x["scale"] * '), put(C_DQ, '{0} * x["scale"]'))),

    Mistake(10, "scores' gradient without Gamma",
            chunks(swap(C_DQ, " * Gamma"), swap(C_DK, " * Gamma")), wy_form(swap(W_DP, " * wy.Gamma"))),

    Mistake(11, "dS does not go through what a token erases", rule((STATE_ERASES, "pass")),
            rule(swap(DECAY_BACK, "* dS", "* (dS + _outer(k, dv))"))),
    Mistake(11, "dS does not go through what a chunk erases",
            chunks(swap(C_DS, " - dot(_t(W), dV_new)")), wy_form(swap(W_DS, " - _t(wy.W[chunk]) @ dV_new[chunk]"))),
    Mistake(11, "dS misses what a chunk reads",
            chunks(swap(C_DS, " + dot(_t(decay * Q), do)")), wy_form(swap(W_DS, " + dS_read[chunk]"))),
    Mistake(11, "dV_new without what later chunks read",
            chunks(swap(C_DV_NEW, " + dot(tail * K, dS)")), wy_form(swap(W_DV_NEW_TAIL, "+= ", "+= 0 * "))),
    Mistake(11, "dV_new without what the chunk reads",
            chunks(swap(C_DV_NEW, "dot(_t(P), do) + ")), wy_form(put(W_DV_NEW, "0 * {0}"))),
    Mistake(11, "no dW", chunks(swap(C_DW, "-dot", "0 * dot")), wy_form(swap(W_DW, "-dV_new", "0 * dV_new"))),
    Mistake(11, "no dA", chunks(put(C_DA, "0 * {0}")), wy_form(put(W_DA, "0 * {0}"))),
    Mistake(11, "dA with the other sign", chunks(put(C_DA, "-{0}")), wy_form(put(W_DA, "-{0}"))),
    Mistake(11, "dA without T on its left",
            chunks(swap(C_DA, "dot(_t(T), dot(dT, _t(T)))", "dot(dT, _t(T))")),
            wy_form((W_DA, "dA = -np.tril(dU @ _t(wy.U) + dW @ _t(wy.W), -1)"))),
    Mistake(11, "dA without T on either side",
            chunks(swap(C_DA, "dot(_t(T), dot(dT, _t(T)))", "dT")),
            wy_form((W_DA, "dA = -np.tril(dU @ _t(beta[..., None] * v) + dW @ _t(beta[..., None] * decay * k), -1)"))),
    Mistake(11, "dA without what comes through U",
            chunks(swap(C_DT, "dot(dU, _t(b * V)) + ")), wy_form(swap(W_DA, "dX_U @ _t(wy.U) + "))),
    Mistake(11, "dA without what comes through W",
            chunks(swap(C_DT, " + dot(dW, _t(b * decay * K))")), wy_form(swap(W_DA, " + dX_W @ _t(wy.W)"))),
    Mistake(11, "nothing through the scores",
            chunks(put(C_DP, "0 * {0}")), wy_form(put(W_D_SCORES, "0 * {0}"))),
    Mistake(11, "dk of one side of the Gram matrix",
            chunks(swap(C_DK_OF_A, " + _t(dgram)")), wy_form(swap(W_DK_OF_A, " + _t(dGram)"))),
    Mistake(11, "dk without what it erases", rule((KEY_ERASES, "pass")),
            chunks((C_DK_OF_W, "pass"), swap(C_DK_OF_A, "dgram + "))),
    Mistake(11, "dk without what it writes", rule(put(WRITE_BACK, "0 * {0}")),
            chunks((C_DK, "dK = 0 * K"), swap(C_DK_OF_A, " + _t(dgram)"))),
    Mistake(11, "dk without the state's end", chunks(swap(C_DK, " + tail * d_tail_K")), wy_form((W_DK_TAIL, "pass"))),
    Mistake(11, "dk without the scores",
            chunks(swap(C_DK, "dot(_t(dP * Gamma), Q) + ")), wy_form(put(W_DK, "0 * {0}"))),
    Mistake(11, "dk without W", chunks((C_DK_OF_W, "pass")),
            wy_form(("dk = beta[..., None] * decay * dX_W", "dk = 0 * k"),
            ("row = (dk * k).sum(-1)", "row = (beta[..., None] * decay * dX_W * k).sum(-1)"))),
    Mistake(11, "dq without the state", chunks(swap(C_DQ, "decay * d_decay_Q + ")), wy_form(swap(W_DQ, "+=", "="))),
    Mistake(11, "dq without the scores", chunks(swap(C_DQ, " + dot(dP * Gamma, K)")), wy_form((W_DQ, "pass"))),
    Mistake(11, "dbeta without what is erased", rule(swap(ERROR_BACK, "error", "v")),
            chunks((C_DBETA, "dbeta = (d_bV * V).sum(-1)"))),
    Mistake(11, "dbeta without A", chunks(swap(C_DBETA, " + (dA * gram * Gamma).sum(-1)")),
            wy_form((W_DBETA_OF_A, "pass"))),
    Mistake(11, "dbeta without W",
            chunks(swap(C_DBETA, " + (d_bK * decay * K).sum(-1)")),
            wy_form(swap(W_DBETA, " + (dX_W * decay * k).sum(-1)"))),
    Mistake(11, "dv without beta", rule(swap(TOKEN_RETURN, "dv", "du")), chunks(swap(C_DV, "b * "))),
    Mistake(11, "dg without what is erased", rule(swap(DECAY_GRADIENT, "dS", "(dS + _outer(k, dv))")),
            rule(put(DECAY_GRADIENT, "{0} + ((v - error) * dv).sum(-1)"))),
    Mistake(11, "dg without the scores and A",
            chunks(swap(C_DGC, "pair.sum(-1) - pair.sum(-2) + ")), wy_form(swap(W_DG, "pair + pair_wy", "0 * pair"))),
    Mistake(11, "dg without the scores",
            chunks(swap(C_PAIR, "dP * P + ")), wy_form(swap(W_DG, "pair + pair_wy", "pair_wy"))),
    Mistake(11, "dg without A", chunks(swap(C_PAIR, " + dA * A")), wy_form(swap(W_DG, "pair + pair_wy", "pair"))),
    Mistake(11, "dg without what is read",
            chunks(swap(C_DGC, "(decay * d_decay_Q * Q).sum(-1) + ")), wy_form(swap(W_DG, "row + row_wy", "row_wy"))),
    Mistake(11, "dg without W",
            chunks(swap(C_DGC, " + (d_bK * b * decay * K).sum(-1)")), wy_form(swap(W_DG, "row + row_wy", "row"))),
    Mistake(11, "dg without the decay to the chunk's end",
            chunks(swap(C_DGC, " - d_tail"), swap(C_LAST_DGC, "d_tail.sum(-1) + ")),
            wy_form(swap(W_DG, "tail", "0 * tail"))),
    Mistake(11, "dg without the decay of the whole chunk",
            chunks(swap(C_LAST_DGC, " + d_whole")), wy_form(swap(W_DG, "whole", "0 * whole"))),

    Mistake(13, "gradients of a short chunk not written",
            chunks((C_PUT_BACK, f"**{{name: d * (gc.shape[-1] == chunk) for name, d in dict({C_PUT_BACK}.items()}})")),
            wy_form(swap(W_PUT_BACK, "(x,", "(x * chunks.filled.all(1).reshape(-1, *(1,) * (x.ndim - 1)),"))),
    Mistake(13, "in the backward, the last gate of a short chunk read from its padding",
            chunks((C_KEPT, f"{C_KEPT}\n        tail, whole = (tail, whole) if gc.shape[-1] == chunk else "
                            "(np.exp(-gc)[..., None], dtype.type(1))")),
            wy_form(swap(W_DECAYS_BACK, "wy.gc", "wy.gc * chunks.filled[:, None]"))),

    Mistake(14, "dS_end ignored", rule(becomes(BACK, dS_end="None")), chunks(becomes(C_END_BACK, dS_end="0 * {0}"))),
    Mistake(14, "dS0 lost", rule(returns(gradients="*gradients[:5], 0 * gradients[5]")),
            chunks(put(C_START_BACK, "0 * {0}"))),
    Mistake(14, "dS_end returned as dS0",
            rule(swap(START_BACK, "= dS", "= dS_end[n]")), chunks((C_START_BACK, 'out["dS0"] = x["dS_end"]'))),
    Mistake(14, "dS0 is the gradient after the first token",
            rule((TOKEN_BACK, f"after = dS\n            {TOKEN_BACK}"), swap(START_BACK, "= dS", "= after")),
            tokens((C_DS, f"after = dS\n        {C_DS}"), swap(C_START_BACK, "= dS", "= after"))),

    Mistake(15, "gradients of row 0 for every row",
            rule(put(BACK, "[np.broadcast_to(d[:1], d.shape) for d in {0}]")),
            chunks(("return out", "return {name: y if name[0] != 'd' else np.broadcast_to(y[:1], y.shape) "
                                  "for name, y in out.items()}"))),
    Mistake(15, "gradients of row 0 alone",
            rule(put(BACK, f"[{ONLY_ROW_0.format('d')} for d in {{0}}]")),
            chunks(("return out", f"return {{name: y if name[0] != 'd' else {ONLY_ROW_0.format('y')} "
                                  "for name, y in out.items()}"))),
    Mistake(15, "dS_end of row 0 for every row",
            rule(becomes(BACK, dS_end=ROW_0)),
            chunks(becomes(C_END_BACK, dS_end=ROW_0),
                   (C_STATES, '{"S0": x["S0"][n:n + 1], "dS_end": x["dS_end"][:1]}'))),
    Mistake(15, "do of row 0 for every row", rule(becomes(BACK, do=ROW_0)), chunks(becomes(C_DO, do=ROW_0))),

    Mistake(18, "dS in bfloat16 after every token", rule(put(DECAY_BACK, BF16)), tokens(put(C_DS, BF16)), by="size"),
    Mistake(18, "dS in bfloat16 after every chunk",
            chunks(put(C_DS, BF16)), wy_form((W_DS, BF16.format(W_DS))), by="size"),

    Mistake(19, "TF32 in the backward",
            chunks((C_END, f"{C_END}\n    operand = tf32")),
            rule((READ_BACK, "dq = scale * _read(tf32(do), _t(tf32(S_decayed + _outer(k, u))))"),
                 swap(WRITE_BACK, "u, _t(dS)", "tf32(u), _t(tf32(dS))"),
                 ("du = _read(k, dS)", "du = _read(tf32(k), tf32(dS))"),
                 swap(KEY_ERASES, "dv, _t(S_decayed)", "tf32(dv), _t(tf32(S_decayed))"),
                 ("_outer(q, scale * do)", "_outer(tf32(q), tf32(scale * do))"), swap(STATE_ERASES, "dv", "tf32(dv)")),
            by="size"),

    Mistake(28, "dq of the state before the write",
            rule(swap(READ_BACK, "S_decayed + _outer(k, u)", "S_decayed")),
            chunks(swap(C_DQ, "dP", "np.tril(dP, -1)"))),

    Mistake(29, "dS does not decay from token to token",
            rule((DECAY_BACK, "pass")),
            tokens((C_DS, "dS = dS + dot(_t(Q), do) - dot(_t(b * K), dV_new)"))),
    Mistake(29, "dS does not decay from chunk to chunk",
            chunks(swap(C_DS, "whole * ")), wy_form(swap(W_DS, "decay_whole[chunk] * "))),
    Mistake(29, "dS without the first gate of a chunk",
            chunks((C_DS, "late = np.exp(gc - gc[..., :1])[..., None]\n        dS = late[..., -1:, :] * dS + "
                          "dot(_t(late * Q), do) - dot(_t(dot(T, b * late * K)), dV_new)")),
            wy_form((W_DS_READ, "late = np.exp(wy.gc - wy.gc[..., :1]).astype(K.dtype)[..., None]\n    "
                                "dS_read = _t(late * Q) @ dO"),
                    (W_DS, "late[chunk][..., -1:, :] * dS_after[chunk] + dS_read[chunk] - _t(wy.T[chunk] @ "
                           "(Beta[chunk][..., None] * late[chunk] * K[chunk])) @ dV_new[chunk]"))),
    Mistake(29, "dS without the decay of what a chunk reads",
            chunks(swap(C_DS, "decay * ")), wy_form(swap(W_DS_READ, "decay * "))),

    Mistake(32, "dq and dk swapped", rule(returns(gradients="gradients[1], gradients[0], *gradients[2:]")),
            chunks(swap(C_PUT_BACK, "dq=dQ, dk=dK", "dq=dK, dk=dQ"))),
    Mistake(32, "dg and dbeta swapped",
            rule(returns(gradients="*gradients[:3], gradients[4], gradients[3], gradients[5]")),
            chunks(swap(C_PUT_BACK, "dg=dg, dbeta=dbeta", "dg=dbeta, dbeta=dg"))),
    Mistake(32, "dv before dq and dk", rule(returns(gradients="gradients[2], *gradients[:2], *gradients[3:]")),
            chunks(("return out", 'return out | {"dq": out["dv"], "dk": out["dq"], "dv": out["dk"]}'))),
)
