"""The labs' exercise notebook, with fewbit in place of the solutions: two changed lines at most.

A section is the cell with its functions, and a cell that uses them. Once the functions are those of
exercises.py, typed as a student types them; then that cell is replaced by the lines of SWAP, and
nothing else changes. With ``parity=True`` the numbers are the same to the last bit.
"""

import ast
import inspect

import pytest
import torch
import transformers

import exercises
from fewbit import lab
from tiny import probe, tiny

BEGIN = """
import copy

def evaluate(model):
    logits = model(tokens).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

def reset():
    return copy.deepcopy(loaded)

input_feat = get_calib_feat(loaded, blocks)
act_scales = lab_act_scales(loaded)
"""

# Section: the functions that its first cell defines, and its second cell.
SECTIONS = {
    "1.1": (["pseudo_quantize_model_salient_weight_fp16"], """
model = reset()
pseudo_quantize_model_salient_weight_fp16(model, w_bit=3, q_group_size=16, input_feat=input_feat)
print(evaluate(model))
"""),
    "1.2": (["pseudo_quantize_model_random_weight_fp16"], """
torch.manual_seed(0)
model = reset()
pseudo_quantize_model_random_weight_fp16(model, w_bit=3, q_group_size=16, input_feat=input_feat)
print(evaluate(model))
"""),
    "1.3": (["pseudo_quantize_model_weight_scaleup"], """
for scale_factor in [1, 1.5, 2, 2.5, 3]:
    model = reset()
    pseudo_quantize_model_weight_scaleup(
        model, w_bit=3, q_group_size=16, input_feat=input_feat, scale_factor=scale_factor
    )
    print(scale_factor, evaluate(model))
"""),
    "2": (["search_module_scale", "scale_ln_fcs", "scale_fc_fc", "auto_scale_block",
           "pseudo_quantize_model_weight_auto_scale"], """
model = reset()
pseudo_quantize_model_weight_auto_scale(model, w_bit=3, q_group_size=16, input_feat=input_feat)
print(evaluate(model))
"""),
    "3": (["smooth_ln_fcs_by_scale", "smooth_lm_by_scale"], """
for scale in [0.01, 1, 10, 100]:
    model = reset()
    smooth_lm_by_scale(model, scale)
    print(scale, evaluate(quantize_opt(model)))
"""),
    "4": (["scale_ln_fcs", "smooth_ln_fcs", "smooth_lm"], """
for alpha in [0.1, 0.5, 0.9]:
    model = reset()
    smooth_lm(model, act_scales, alpha)
    print(alpha, evaluate(quantize_opt(model)))
"""),
    "5": (["get_orthogonal_matrix", "fuse_ln_linear", "fuse_layer_norms_tinyllama",
           "rotate_model_weight"], """
model = reset()
R1 = get_orthogonal_matrix(model.config.hidden_size, mode="random")
fuse_layer_norms_tinyllama(model)
rotate_model_weight(model, R1)
print(evaluate(model))
print(evaluate(quantize_tinyllama(model)))
"""),
}  # fmt: skip

# What replaces the first cell. The second line of each asks for the exercise's own arithmetic.
SWAP = {
    "5": "from fewbit.lab import *",
} | {
    section: f"import functools, fewbit.lab\n"
    f"{names[-1]} = functools.partial(fewbit.lab.{names[-1]}, parity=True)"
    for section, (names, _) in SECTIONS.items() if section != "5"
}  # fmt: skip


def opt():
    """Wide enough for one percent of its columns to be one column."""
    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=128, word_embed_proj_dim=128, ffn_dim=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval().requires_grad_(False)


def run(section, first):
    """What the section prints, as lists of numbers, with ``first`` as its first cell."""
    torch.manual_seed(0)
    model = tiny("llama-gqa") if section == "5" else opt()
    printed = []
    names = vars(exercises) | {
        "loaded": model, "tokens": probe(2, 24), "blocks": [probe(1, 16, seed=s) for s in range(4)],
        "quantize_opt": lab.quantize_opt, "quantize_tinyllama": lab.quantize_tinyllama,
        "lab_act_scales": act_scales, "print": lambda *values: printed.append(values),
    }  # fmt: skip
    for name in SECTIONS[section][0]:
        names.pop(name)  # only the first cell brings it back
    with torch.no_grad():
        for cell in (first, BEGIN, SECTIONS[section][1]):
            exec(cell, names)
    return printed


def act_scales(model):
    found = {}

    def hook(name):
        def see(module, args):
            found[name] = torch.maximum(found.get(name, 0 * args[0]), args[0].abs())

        return see

    hooks = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules()
             if isinstance(m, torch.nn.Linear)]
    model(probe(1, 16))
    for h in hooks:
        h.remove()
    return {name: level.amax((0, 1)) for name, level in found.items()}


def typed(section):
    return "\n".join(inspect.getsource(getattr(exercises, n)) for n in SECTIONS[section][0])


@pytest.mark.parametrize("section", SECTIONS)
def test_two_lines_give_the_same_numbers(section):
    assert len(SWAP[section].splitlines()) <= 2
    own, ours = run(section, typed(section)), run(section, SWAP[section])
    if section == "5":  # another random matrix: equal in what the rotation keeps
        assert ours[0] == pytest.approx(own[0], rel=1e-5)
        assert ours[1] == pytest.approx(own[1], rel=1e-2)
    else:
        assert ours == own and len({values[-1] for values in own}) == len(own)


@pytest.mark.parametrize("section", SECTIONS)
def test_one_line_gives_the_corrected_form(section):
    printed = run(section, "from fewbit.lab import *")
    assert all(torch.tensor(values[-1]).isfinite() for values in printed)


def test_the_lab_has_every_name_and_parameter_of_the_exercises():
    tree = ast.parse(inspect.getsource(exercises))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name != "search_module_scale":
            ours = inspect.signature(getattr(lab, node.name)).parameters
            own = [a.arg for a in node.args.args]
            if node.name != "get_calib_feat":  # the exercise's downloads its blocks
                assert list(ours)[: len(own)] == own, node.name
