"""Bugs planted in the text of the kernels: what `test_planted.py` builds, runs and wants to see caught.

Each is (name, the text that it changes, the changed text). The text must occur exactly once, so that a bug whose place
is gone fails. In CUDA C++ the changed text says BUG where it asks whether the bug is on, and all bugs are compiled into
one emulator, `build`; of Triton's kernels each bug makes a module of its own.
"""

import concurrent.futures
import importlib.util
import pathlib
import re
import sysconfig
import types

import pybind11
from beside import Beside

ROOT = pathlib.Path(__file__).resolve().parent.parent

CONVOLUTION = [
    ("a border's last position left out", "if (is_within(i_w, g.w.in))", "if (is_within(i_w + BUG, g.w.in))"),
    ("a border's position too many", "return uint32_t(i) < uint32_t(size);", "return i >= 0 && i < size + BUG;"),
    ("wrong phase", "phase / gcd * inverse % period", "phase / gcd * (BUG ? 1 : inverse) % period"),
    ("a phase's first tap for all", "const int u = o + before, phase = u % stride;",
     "const int u = o + before, phase = BUG ? 0 : u % stride;"),
    ("steps of one where the layer is dilated", "i_w -= g.w.step)", "i_w -= BUG ? 1 : g.w.step)"),
    ("taps of rows and columns exchanged", "return (k_d * h.kernel + k_h) * w.kernel + k_w;",
     "return BUG ? (k_d * h.kernel + k_w) * w.kernel + k_h : (k_d * h.kernel + k_h) * w.kernel + k_w;"),
    ("padding off by one", "return i * stride + k * dilation - before;",
     "return i * stride + k * dilation - before + BUG;"),
    ("neighbouring output channel", "sum[j * kOut + c] += a[j] * b;",
     "sum[j * kOut + (BUG ? kOut - 1 - c : c)] += a[j] * b;"),
    ("first channel's bias for all", "to_float(load(bias, channel + c))",
     "to_float(load(bias, channel + (BUG ? 0 : c)))"),
    ("neighbouring positions the same", "g.w.taps_of(o_w + v)", "g.w.taps_of(o_w + (BUG ? 0 : v))"),
    ("first sample for all", "const Global<const T> from = x + item.sample * g.x.sample;",
     "const Global<const T> from = x + (BUG ? 0 : item.sample) * g.x.sample;"),
    ("first group for all", "const int channel = group * geometry.group_in;",
     "const int channel = (BUG ? 0 : group) * geometry.group_in;"),
    ("a thread past the last row", "row < rows && tile < channel_tiles", "row < rows + BUG && tile < channel_tiles"),
    ("sums of the first lane alone", "sum[j] = warp_sum(sum[j]);", "sum[j] = BUG ? sum[j] : warp_sum(sum[j]);"),
    ("two lanes write", "if (lane_index() != 0) return;", "if (lane_index() > BUG) return;"),
    ("a lane's first row left out", "int r = lane_index(); r < count;", "int r = lane_index() + 32 * BUG; r < count;"),
    ("a last part as long as the others", "left < kRows ? int(left) : kRows",
     "left < kRows && !BUG ? int(left) : kRows"),
    ("last part of the sums left out", "for (int64_t part = 0; part < parts; ++part)",
     "for (int64_t part = 0; part + BUG < parts; ++part)"),
]  # fmt: skip

NORM = [
    ("no barrier before the warps' sums are read", "barrier();\n        const int warps = kLast",
     "if (!BUG) barrier();\n        const int warps = kLast"),
    ("no barrier before the block's sum is read", "sums[32] = sum;\n    barrier();",
     "sums[32] = sum;\n    if (!BUG) barrier();"),
    ("wrong lane", "x[j] += shuffle_xor(x[j], bits);", "x[j] += shuffle_xor(x[j], BUG && bits == 16 ? 1 : bits);"),
    ("neighbouring column's sums", "((first + w) * apart + column) * kChannels + j];",
     "((first + w) * apart + (BUG ? 0 : column)) * kChannels + j];"),
    ("variance of a sample", "float(all / double(tiles.rows))", "float(all / double(tiles.rows - BUG))"),
    ("tiles' means taken as equal", "double(tiles.rows_of(i)) * off * off",
     "double(tiles.rows_of(i)) * off * off * !BUG"),
    ("a last tile as long as the others", "float(left < tile_rows ? left : tile_rows)",
     "float(left < tile_rows && !BUG ? left : tile_rows)"),
    ("a row past the end", "inside && row(k) < tiles.rows;", "inside && row(k) < tiles.rows + BUG;"),
    ("a tile of one sample alone", "samples = uint32_t(along) / uint32_t(tiles.size);",
     "samples = BUG ? 0 : uint32_t(along) / uint32_t(tiles.size);"),
    ("eps left out", "sqrt_of(a.invstd[j] + eps)", "sqrt_of(a.invstd[j] + (BUG ? 0.0f : eps))"),
    ("first channel's bias for all", "read(a.bias, bias, channel);", "read(a.bias, bias, BUG ? 0 : channel);"),
    ("squares of the first access alone", "to_float(kept[k].at[j]) - mean[",
     "to_float(kept[BUG ? 0 : k].at[j]) - mean["),
    ("gradient as if the variance were given", "(along[c] + xhat[j] * across[c])",
     "(along[c] + xhat[j] * (BUG ? 0.0f : across[c]))"),
    ("gradient by the argument, not by xhat", "dweight[kLast ? j : 0] += d[j] * xhat[j];",
     "dweight[kLast ? j : 0] += d[j] * (BUG ? xhat[j] * a.weight[kLast ? j : 0] : xhat[j]);"),
    ("partial sums of two tiles in one place", "* tiles.parts + part; }", "* tiles.parts + (BUG ? 0 : part); }"),
    ("last element not activated", "for (int64_t i = first; i < count; ++i)",
     "for (int64_t i = first; i + BUG < count; ++i)"),
]  # fmt: skip

WALK = [
    ("no barrier after the lengths", "}\n        barrier();\n        p.walked = 0;",
     "}\n        if (!BUG) barrier();\n        p.walked = 0;"),
    ("no barrier of the warp before weights are staged",
     "warp_barrier();\n            MMFAST_UNROLL\n            for (int piece",
     "if (!BUG) warp_barrier();\n            MMFAST_UNROLL\n            for (int piece"),
    ("no barrier of the warp after weights are staged",
     "warp_barrier();\n            MMFAST_UNROLL\n            for (int i = 0; i < kParts",
     "if (!BUG) warp_barrier();\n            MMFAST_UNROLL\n            for (int i = 0; i < kParts"),
    ("swapped fragments of A", "(lane % 8 * 2 + lane / 8 % 2) * kPitch",
     "(BUG ? lane % 16 : lane % 8 * 2 + lane / 8 % 2) * kPitch"),
    ("swapped fragments of B", "multiply<T>(sum, of_a, b.at[2 * which], b.at[2 * which + 1]);",
     "multiply<T>(sum, of_a, b.at[2 * which + BUG], b.at[2 * which + !BUG]);"),
    ("wrong lane's row of B", "from = at + lane % 8 * pitch", "from = at + (BUG ? 7 - lane % 8 : lane % 8) * pitch"),
    ("low parts of W_hh left out", "multiply<float>(sum, low, bits_of(b[0]), bits_of(b[1]));",
     "if (!BUG) multiply<float>(sum, low, bits_of(b[0]), bits_of(b[1]));"),
    ("low parts of h left out", "multiply<float>(sum, high, rest[0], rest[1]);",
     "if (!BUG) multiply<float>(sum, high, rest[0], rest[1]);"),
    ("last chain of sums left out", "for (int chain = 1; chain < kChains; ++chain)",
     "for (int chain = 1; chain + BUG < kChains; ++chain)"),
    ("reverse direction walked forward", "return (p.direction == 0) == rising ? i",
     "return (p.direction == 0 || BUG) == rising ? i"),
    ("resets of the reverse direction a step off", "const int at = t + p.direction;",
     "const int at = t + (BUG ? 0 : p.direction);"),
    ("a step past a length", "length < 0 ? 0 : length > steps ? steps : length",
     "length < 0 ? 0 : length + BUG > steps ? steps : length + BUG"),
    ("stale h", "now = i % 2 * kPanel, next = kPanel - now, mine",
     "now = i % 2 * kPanel, next = BUG ? now : kPanel - now, mine"),
    ("c of a step past a length kept", "if (active) state.c[r][u] = cell_of[u];",
     "if (active || BUG) state.c[r][u] = cell_of[u];"),
    ("h0 left out of what W_hh was multiplied by", "} else if (has_h0) {", "} else if (has_h0 && !BUG) {"),
    ("gradient of n's two sides exchanged", "g[3][u] = g[2][u], g[2][u] = of_cell[u];",
     "g[3][u] = BUG ? of_cell[u] : g[2][u], g[2][u] = BUG ? g[2][u] : of_cell[u];"),
    ("gradient of c passes a reset", "if (is_cut) s.dc[r][u] = 0.0f;", "if (is_cut && !BUG) s.dc[r][u] = 0.0f;"),
    ("first sequences of a block for all blocks", "p.first = (block - p.direction * groups) * kRows;",
     "p.first = BUG ? 0 : (block - p.direction * groups) * kRows;"),
]  # fmt: skip

RESIDENT = [
    ("no barrier after a step", "barrier();\n        }\n        this->end(p, m, sent",
     "if (!BUG) barrier();\n        }\n        this->end(p, m, sent"),
    ("no barrier after a step back", "barrier();\n        }\n        if (p.walked > 0) {",
     "if (!BUG) barrier();\n        }\n        if (p.walked > 0) {"),
    ("no wait for the next step's input", "cut = cut_next;\n            copy_wait<kSlots - 2>();",
     "cut = cut_next;\n            if (!BUG) copy_wait<kSlots - 2>();"),
    ("a wait for one copy too few, back", "cut = cut_next;\n            copy_wait<kSlots - 3>();",
     "cut = cut_next;\n            if (BUG) copy_wait<kSlots - 2>();\n            else copy_wait<kSlots - 3>();"),
    ("a slot reused a step too early",
     "fetch(p, m, i + kSlots - 1, fetched);\n            copy_commit();\n            //",
     "fetch(p, m, i + kSlots - 1 + BUG, fetched);\n            copy_commit();\n            //"),
    ("stale gates", "this->send(p, m, i - 1, walk.walked_row(p, i - 1));",
     "this->send(p, m, i - 1 - BUG, walk.walked_row(p, i - 1));"),
    ("a thread's units and sequences exchanged", "s[k][0] = sums[k].at[r], s[k][1] = sums[k].at[2 + r];",
     "s[k][0] = sums[k].at[BUG ? 2 * r : r], s[k][1] = sums[k].at[BUG ? 1 + 2 * r : 2 + r];"),
    ("gradient of h passes a reset", "dh[r][u] += cut >> r & 1 ? 0.0f", "dh[r][u] += (cut >> r & 1) && !BUG ? 0.0f"),
]  # fmt: skip

CLUSTER = [
    ("no barrier of the cluster", "walked_row(p, kSlots - 1);\n        cluster_barrier();",
     "walked_row(p, kSlots - 1);\n        if (BUG) barrier();\n        else cluster_barrier();"),
    ("no wait for the others' h", "if (i > 0) barrier_wait(full", "if (i > BUG * p.walked) barrier_wait(full"),
    ("waits for the phase before", "barrier_wait(full, i % 2, (i - 1) / 2 % 2);",
     "barrier_wait(full, i % 2, (BUG ? i + 1 : i - 1) / 2 % 2);"),
    ("too few bytes are waited for", "kRows * kAll * int(sizeof(T)));",
     "kRows * (kAll - BUG * UNITS) * int(sizeof(T)));"),
    ("h into the next block of the cluster alone", "(cluster_rank() + piece / kVectors) % CLUSTER);",
     "(cluster_rank() + (BUG ? 1 : piece / kVectors)) % CLUSTER);"),
    ("another block's place of h", "* kAllPitch + p.base + unit, h, full",
     "* kAllPitch + (BUG ? kAll - UNITS - p.base : p.base) + unit, h, full"),
    ("no barrier before sums are read", "copy_wait<kSlots - 2>();\n            barrier();",
     "copy_wait<kSlots - 2>();\n            if (!BUG) barrier();"),
    ("no wait for inputs", "tile[0].at[2 + r]}});\n            copy_wait<kSlots - 2>();",
     "tile[0].at[2 + r]}});\n            if (!BUG) copy_wait<kSlots - 2>();"),
    ("sums of one half", "sum = i % 2 * kSums;", "sum = (BUG ? 0 : i % 2) * kSums;"),
    ("first gate's rows of W_hh for all", "return Part{gate,", "return Part{BUG ? 0 : gate,"),
    ("first block's rows of W_hh for all", "p.base + unit, part * W::kStaged}",
     "(BUG ? 0 : p.base) + unit, part * W::kStaged}"),
    ("no barrier of the warp before h is stored", "warp_barrier();\n        MMFAST_UNROLL",
     "if (!BUG) warp_barrier();\n        MMFAST_UNROLL"),
    ("no barrier of the cluster, back", "copy_wait<kSlots - 2>();\n        cluster_barrier();",
     "copy_wait<kSlots - 2>();\n        if (BUG) barrier();\n        else cluster_barrier();"),
    ("no wait for the inbox", "barrier_wait(full, i % 2, i / 2 % 2);",
     "if (!BUG) barrier_wait(full, i % 2, i / 2 % 2);"),
    ("last block's part left out", "for (int block = 0; block < CLUSTER; ++block)",
     "for (int block = 0; block + BUG < CLUSTER; ++block)"),
    ("parts into the wrong owner", "full, i % 2, unit / UNITS);",
     "full, i % 2, BUG ? CLUSTER - 1 - unit / UNITS : unit / UNITS);"),
    ("parts of two blocks in one place", "to = i % 2 * kInbox + p.base * kRows",
     "to = i % 2 * kInbox + (BUG ? 0 : p.base * kRows)"),
    ("no barrier before gates are multiplied", "copy_wait<kSlots - 3>();\n            barrier();",
     "copy_wait<kSlots - 3>();\n            if (!BUG) barrier();"),
    ("a slot reused a step too early, back", "fetch(p, m, i + kSlots, fetched);",
     "fetch(p, m, i + kSlots + BUG, fetched);"),
    ("gradient of h passes a reset", "dh[r][u] += cut >> r & 1 ? 0.0f", "dh[r][u] += (cut >> r & 1) && !BUG ? 0.0f"),
]  # fmt: skip

GATES = [
    ("reset gate before the product", "n = gate_tanh<T>(n + r * a_n);",
     "n = gate_tanh<T>(BUG ? r * (n + a_n) : n + r * a_n);"),
    ("update gate inverted", "return n + z * (h - n);", "return BUG ? h + z * (n - h) : n + z * (h - n);"),
    ("gradient of c without the forget gate", "dc = dcell * f;", "dc = BUG ? dcell : dcell * f;"),
]  # fmt: skip

STEPS = [
    ("c of a row past its length kept", "if (active) state[j] = kept[j];", "if (active || BUG) state[j] = kept[j];"),
    ("gradient of c passes a reset", "if (cut) carried[j] = 0.0f;", "if (cut && !BUG) carried[j] = 0.0f;"),
    ("a row past its length not skipped", "if (inside) skip(p);", "if (inside && !BUG) skip(p);"),
]  # fmt: skip

#: Of each source in csrc/cuda its bugs. Those of a header are in each kernel that includes it.
CUDA = {
    "conv_transpose.cu": CONVOLUTION,
    "normalize.cu": NORM,
    "rnn_walk.h": WALK,
    "rnn_resident.cu": RESIDENT,
    "rnn_cluster.cu": CLUSTER,
    "rnn_gates.h": GATES,
    "rnn.cu": STEPS,
}
#: (source, bug): the bug's number is its place here, from 1 on.
NUMBERED = [(source, bug[0]) for source, bugs in CUDA.items() for bug in bugs]

TRITON_CONVOLUTION = [
    ("a border's last position left out", "m_x = m_row & (b_iw >= 0) & (b_iw < in_w)",
     "m_x = m_row & (b_iw >= 0) & (b_iw < in_w - 1)"),
    ("wrong phase", "(phase // GCD * INVERSE) % PERIOD", "(phase // GCD) % PERIOD"),
    ("neighbouring tap", "KERNEL[2] + j_w * PERIOD[2]", "KERNEL[2] + j_w"),
    ("taps of rows and columns exchanged", "(first_d * KERNEL[1] + first_h) * KERNEL[2] + first_w +",
     "(first_d * KERNEL[1] + first_w) * KERNEL[2] + first_h +"),
    ("first group for all", "b_x_ci = i_group * GROUP_CIN + b_ci", "b_x_ci = b_ci"),
    ("first group's bias for all", "tl.load(bias + b_co,", "tl.load(bias + b_channel,"),
    ("first group written by all", "b_column = _wide(b_co, WIDE) * y_channel",
     "b_column = _wide(b_channel, WIDE) * y_channel"),
    ("last input channel left out", "m_k = b_ci < GROUP_CIN", "m_k = b_ci < GROUP_CIN - 1"),
    ("first sample for all", "_wide(b_sample, WIDE) * (in_positions * CIN)", "_wide(b_sample, WIDE) * 0"),
    ("moments of what is outside", "b_off = tl.where(m_out, b_stored - b_mean[None, :], 0.0)",
     "b_off = b_stored - b_mean[None, :]"),
    ("variance of a sample", "(tl.sum(b_squares) / count)", "(tl.sum(b_squares) / (count - 1))"),
    ("tiles' means taken as equal", "b_part + b_n * b_delta * b_delta", "b_part"),
    ("squares of what is outside", "b_squares += tl.where(m_y, b_off * b_off, 0.0)", "b_squares += b_off * b_off"),
    ("first set for all", "base = (i_set.to(tl.int64) * batch + sample)", "base = sample"),
    ("eps left out", "tl.sqrt(b_var + eps)", "tl.sqrt(b_var)"),
    ("gradient as if the variance were given", "b_dz -= b_dbias[None, :] + b_xhat * b_dweight[None, :]",
     "b_dz -= b_dbias[None, :]"),
    ("gradient by the argument, not by xhat", "b_dweight += b_dz * b_xhat", "b_dweight += b_dz * b_u"),
    ("parts of the bias for the weight", "b_dweight += tl.load(dweight_parts +", "b_dweight += tl.load(dbias_parts +"),
    ("last element without a gradient", "m_y = o_y < count - start", "m_y = o_y < count - start - 1"),
    ("relu's slope at 0", "d = tl.where(u <= 0, 0.0, d)", "d = tl.where(u < 0, 0.0, d)"),
]  # fmt: skip

TRITON_RNN = [
    ("h0 ignored", "    if H0:\n        b_h =", "    if H0 and BIAS and not BIAS:\n        b_h ="),
    ("h of a step past a length", "b_h = tl.where(m_active, b_new, b_h)", "b_h = b_new"),
    ("c of a step past a length", "b_c = tl.where(m_active, b_kept, b_c)", "b_c = b_kept"),
    ("next input of the forward direction for both", "tl.maximum(t + 1 - 2 * i_d, 0), last - 1)\n        p_x",
     "t + 1, last - 1)\n        p_x"),
    ("resets of the reverse direction a step off", "m_cut = t + i_d < b_length", "m_cut = t < b_length"),
    ("a step past a length", "tl.maximum(b_length, 0)", "tl.maximum(b_length + 1, 0)"),
    ("reset gate before the product", "_tanh(b_g2.to(tl.float32) + b_0 * b_2, PRECISE)",
     "_tanh(b_0 * (b_g2.to(tl.float32) + b_2), PRECISE)"),
    ("h passes a reset", "b_1 * (b_before - b_2)", "b_1 * (b_h - b_2)"),
    ("another gate's bias", "b_2 += b_b2", "b_2 += b_b1"),
    ("W_hh transposed", "tl.arange(0, BLOCK), GATES, H, 1, H, BLOCK)", "tl.arange(0, BLOCK), GATES, H, H, 1, BLOCK)"),
    ("forward direction's bias for both", "p_w, p_b = w_hh_reverse, b_hh_reverse", "p_w, p_b = w_hh_reverse, b_hh"),
    ("gradient of n's two sides taken as equal", "b_l2 = b_2 * b_0", "b_l2 = b_2"),
    ("gradient of h without the update gate", "b_direct = b_d * b_z", "b_direct = b_d"),
    ("gradient of c passes a reset", "tl.where(m_cut, 0.0, b_dcell * b_1)", "b_dcell * b_1"),
    ("gradient of h passes a reset", "tl.where(m_cut, 0.0, b_direct + b_0)", "b_direct + b_0"),
    ("first step of the reverse direction taken for another", "b_length - 1 - t)[:, None]",
     "t + 0 * b_length)[:, None]"),
    ("output gate's gradient left out", "b_2 += b_3\n", "b_2 += 0.0 * b_3\n"),
    ("streamed: one left operand for all", "SIZE if LEFTS > 1 else 0", "0"),
    ("streamed: last part of W_hh alone", "b_w0, b_0, input_precision", "b_w0, b_0 * 0.0, input_precision"),
]  # fmt: skip

#: Of each op's triton_kernels.py its bugs.
TRITON = {"conv_transpose": TRITON_CONVOLUTION, "rnn": TRITON_RNN}


def triton_module(op: str, bug: str, folder: pathlib.Path) -> types.ModuleType:
    """An op's Triton kernels with a bug."""
    name = f"mmfast.ops.{op}.triton_kernels"
    (old, new) = next((old, new) for of, old, new in TRITON[op] if of == bug)
    path = folder / "triton_kernels.py"
    path.write_text(changed(pathlib.Path(importlib.util.find_spec(name).origin).read_text(), old, new))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1, f"{source.count(old)} places, not one, have: {old}"
    return source.replace(old, new)


def build(beside: Beside) -> pathlib.Path:
    """The emulator with every bug of CUDA, the one on whose number `mmfast_planted` has."""
    folder = beside.folder()
    for source, bugs in CUDA.items():
        text = (ROOT / "csrc" / "cuda" / source).read_text()
        for name, old, new in bugs:
            text = changed(
                text, old, re.sub(r"\bBUG\b", f"(mmfast_planted == {NUMBERED.index((source, name)) + 1})", new)
            )
        path = folder / "cuda" / source
        path.parent.mkdir(exist_ok=True)
        path.write_text('extern "C" int mmfast_planted;\n#line 1\n' + text)
    (folder / "planted.cpp").write_text('extern "C" __attribute__((visibility("default"))) int mmfast_planted = 0;\n')
    flags = ["-std=gnu++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DMMFAST_EMULATOR", '-DMMFAST_VERSION="planted"']
    flags += [f"-I{path}" for path in (folder, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"])]

    def run(*command: str | pathlib.Path) -> None:
        done = beside.run(*command)
        assert done.returncode == 0, done.stderr[-3000:]

    def compiled(source: pathlib.Path) -> pathlib.Path:
        made = folder / f"{source.stem}.o"
        run("c++", *flags, "-c", source, "-o", made)
        return made

    emulator = sorted((ROOT / "csrc" / "emulator").glob("*.cpp"))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [ROOT / "csrc" / "bindings.cpp", *emulator, folder / "planted.cpp"]))
    library = folder / f"_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    run("c++", "-shared", *objects, "-o", library)
    return library
