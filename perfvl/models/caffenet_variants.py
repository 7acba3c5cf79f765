"""Every row of the CaffeNet128 study's tables: what was trained, and what it reached on ImageNet.

Top-1 accuracy and log-loss on the 50,000 validation images, single centre crop, one run each, as published with the
benchmark of Mishkin, Sergievskiy and Matas 2016 (arXiv:1606.02228). Recipe unless a note says otherwise: LSUV, SGD with
a momentum of 0.9, batches of 256, learning rate 0.01 divided by 10 every 100,000 of 320,000 iterations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """A row: accuracy, log-loss, the fields of the config that differ from the base, and what else to know.

    `config` is None where the row is about the recipe (then the network is the base), or another class of network.
    """

    top1: float
    log_loss: float
    config: Mapping[str, Any] | None = None
    note: str = "the recipe differs, not the network"


def _(top1: float, log_loss: float, config: Mapping[str, Any] | None = None, note: str | None = None) -> Variant:
    if note is None:
        return Variant(top1, log_loss, config, "") if config is not None else Variant(top1, log_loss)
    return Variant(top1, log_loss, config, note)


_GROUPS = {
    "activation": {
        "relu": _(0.471, 2.36, {}),
        "relu_with_lrn": _(0.47, 2.36, {"lrn": True}),
        "tanh": _(0.401, 2.78, {"activation": "tanh"}),
        "scaled_tanh": _(0.423, 2.66, {"activation": "scaled_tanh"}),
        "asinh": _(0.417, 2.71, {"activation": "asinh"}, "gradients clipped at 20"),
        "vlrelu": _(0.469, 2.4, {"activation": "vlrelu"}),
        "rrelu": _(0.478, 2.32, {"activation": "rrelu"}),
        "prelu": _(0.485, 2.29, {"activation": "prelu"}),
        "elu": _(0.488, 2.28, {"activation": "elu"}),
        "elu_alpha05": _(0.485, 2.29, {"activation": "elu", "activation_options": {"alpha": 0.5}}),
        "elu_lrelu_mean": _(0.486, 2.28, {"activation": "elu_leaky"}),
        "shifted_softplus": _(0.486, 2.29, {"activation": "softplus"}),
        "selu": _(0.47, 2.38, {"activation": "selu"}),
        "frelu": _(0.488, 2.27, {"activation": "frelu"}),
        "felu": _(0.489, 2.28, {"activation": "felu"}),
        "maxout_same_complexity": _(
            0.482, 2.3, {"activation": "maxout", "channels": (68, 182, 272, 272, 172), "fc": 1448}
        ),
        "maxout_same_width": _(0.517, 2.12, {"activation": "maxout"}),
        "conv_relu_fc_maxout": _(0.49, 2.26, {"fc_activation": "maxout", "fc": 1448}),
        "conv_elu_fc_maxout": _(0.499, 2.22, {"activation": "elu", "fc_activation": "maxout", "fc": 1448}),
        "apl2": _(0.471, 2.38, {"activation": "apl2"}, 'trained with parameters of positions (mode="reference")'),
        "apl5": _(0.465, 2.39, {"activation": "apl5"}, 'trained with parameters of positions (mode="reference")'),
        "identity": _(0.389, 2.93, {"activation": "identity"}),
        "identity_strided": _(0.035, 6.28, {"activation": "identity", "pooling": "strided"}),
    },
    "batchnorm": {
        "before": _(0.474, 2.35, {"batch_norm": "before"}),
        "before_affine": _(0.478, 2.33, {"batch_norm": "before", "bn_affine": True}),
        "after": _(0.499, 2.21, {"batch_norm": "after"}),
        "after_affine": _(0.493, 2.24, {"batch_norm": "after", "bn_affine": True}),
        "before_affine_ortho": _(
            0.482, 2.31, {"batch_norm": "before", "bn_affine": True}, "orthonormal weights, without LSUV"
        ),
        "after_ortho": _(0.5, 2.2, {"batch_norm": "after"}, "orthonormal weights, without LSUV"),
        "after_rrelu": _(0.5, 2.2, {"batch_norm": "after", "activation": "rrelu"}),
        "after_prelu": _(0.503, 2.19, {"batch_norm": "after", "activation": "prelu"}),
        "after_elu": _(0.498, 2.23, {"batch_norm": "after", "activation": "elu"}),
        "after_maxout": _(
            0.487,
            2.28,
            {"batch_norm": "after", "activation": "maxout", "channels": (68, 182, 272, 272, 172), "fc": 1448},
            "trained with conv4 and conv5 in part before the norm",
        ),
        "after_sigmoid": _(0.475, 2.35, {"batch_norm": "after", "activation": "sigmoid"}),
        "after_tanh": _(0.448, 2.5, {"batch_norm": "after", "activation": "tanh"}, "4 x 64 images: norms of 64"),
        "after_identity": _(0.384, 2.96, {"batch_norm": "after", "activation": "identity"}),
        "after_drop05": _(0.499, 2.21, {"batch_norm": "after"}),
        "after_drop02": _(0.527, 2.09, {"batch_norm": "after", "dropout": 0.2}),
        "after_drop0": _(0.513, 2.19, {"batch_norm": "after", "dropout": 0.0}),
        "googlenet128": _(0.619, 1.61, None, "GoogLeNet of 128 pixels"),
        "googlenet128_before_affine": _(0.603, 1.68, None, "GoogLeNet of 128 pixels"),
        "googlenet128_before_affine_ortho": _(0.607, 1.67, None, "GoogLeNet of 128 pixels"),
        "googlenet128_after": _(0.596, 1.7, None, "GoogLeNet of 128 pixels"),
        "googlenet128_after_ortho": _(0.584, 1.77, None, "GoogLeNet of 128 pixels"),
    },
    "pooling": {
        "max": _(0.471, 2.36, {}),
        "avg": _(0.435, 2.56, {"pooling": "avg"}),
        "stochastic": _(0.438, 2.54, {"pooling": "stochastic"}),
        "stochastic_no_dropout": _(0.429, 2.96, {"pooling": "stochastic", "dropout": 0.0}),
        "max_plus_avg": _(0.483, 2.29, {"pooling": "max_avg"}),
        "strided_conv": _(0.472, 2.35, {"pooling": "strided"}),
        "max_2x2": _(0.484, 2.29, {"pool_size": 2}),
        "max_3x3_pad1": _(0.488, 2.25, {"pool_padding": 1}),
        "gated_max_avg": _(0.471, 2.36, None, "a pool under a patent"),
        "general_2048_unfinished": _(0.464, 2.46, None, "a pool under a patent"),
        "general_4096": _(0.494, 2.25, None, "a pool under a patent"),
        "general_227_4096": _(0.57, 1.86, None, "a pool under a patent"),
        "general_227_4096_authors": _(0.585, 1.78, None, "a pool under a patent"),
    },
    "lr_policy": {
        "step_100k": _(0.471, 2.36),
        "sqrt": _(0.483, 2.29),
        "square": _(0.483, 2.299),
        "linear": _(0.493, 2.24),
        "linear_160k": _(0.466, 2.39),
        "exp_160k": _(0.441, 2.53),
        "bn_drop02_step": _(0.527, 2.09),
        "bn_drop02_linear_105k": _(0.496, 2.24),
        "bn_drop02_linear_105k_lr002": _(0.505, 2.21),
        "bn_drop02_exp_160k": _(0.506, 2.19),
    },
    "colour": {
        "rgb": _(0.471, 2.36, {}),
        "rgb_bn": _(0.469, 2.38, {"color": "rgb_bn"}),
        "clahe_bn": _(0.467, 2.38, {"color": "rgb_bn"}, "images with contrast-limited histogram equalisation"),
        "histeq": _(0.448, 2.48, {}, "images with equalised histograms"),
        "ycrcb_bn": _(0.458, 2.42, {"color": "ycrcb_bn"}),
        "hsv_bn": _(0.451, 2.46, {"color": "hsv_bn"}),
        "gray": _(0.413, 2.7, {"color": "gray"}),
        "learned_gray": _(0.419, 2.66, {"color": "learned_gray"}),
        "A_10_3_tanh": _(0.463, 2.4, {"color": "A"}),
        "B_3_3_vlrelu": _(0.48, 2.32, {"color": "B"}),
        "C_10_3_residual_vlrelu": _(0.482, 2.3, {"color": "C"}),
        "D_log_10_3_vlrelu": _(0.482, 2.29, {"color": "D"}),
        "D2_log_logminus_10_3_vlrelu": _(0.484, 2.29, {"color": "D2"}),
        "E_16_3_vlrelu": _(0.483, 2.3, {"color": "E"}),
        "F_10_3_vlrelu": _(0.485, 2.28, {"color": "F"}),
        "F_10_3_maxout": _(0.488, 2.26, {"color": "maxout"}),
        "nearest_rescale": _(0.467, 2.38, {}, "images resized to the nearest pixel"),
        "concat_rgb_each_pool": _(0.441, 2.51, {"color": "concat_rgb"}),
    },
    "classifier": {
        "pool5_fc_fc_clf": _(0.47, 2.36, {}),
        "fc4096": _(0.497, 2.24, {"fc": 4096}),
        "conv5_fc6conv_fc7conv_clf_avg": _(
            0.494,
            2.34,
            {"pool5": False, "fc_padding": False, "fc_kernels": (3, 1)},
            "scores averaged: the same function as features averaged",
        ),
        "conv5_fc6conv_fc7conv_avg_clf": _(0.489, 2.28, {"pool5": False, "fc_padding": False, "fc_kernels": (3, 1)}),
        "spp2": _(0.471, 2.36, {"spp": 2}),
        "spp3": _(0.483, 2.3, {"spp": 3}),
        "c512_c1024_c1536": _(
            0.482, 2.52, {"fc": (512, 1024, 1536), "fc_kernels": (3, 3, 1), "dropout": (0.0, 0.0, 0.2)}
        ),
        "c512_c1024_c1536_drop": _(
            0.491, 2.29, {"fc": (512, 1024, 1536), "fc_kernels": (3, 3, 1), "dropout": (0.0, 0.3, 0.5)}
        ),
        "elu_base": _(0.488, 2.28, {"activation": "elu"}),
        "elu_pad_fc6avg": _(0.481, 2.32, {"activation": "elu", "average": "fc6", "fc_kernels": (3, 1)}),
        "elu_pad_fc6_fc7_clf_avg": _(
            0.511,
            2.21,
            {"activation": "elu", "fc_kernels": (3, 1)},
            "scores averaged: the same function as features averaged",
        ),
        "elu_pad_fc6_fc7_avg_clf": _(0.508, 2.22, {"activation": "elu", "fc_kernels": (3, 1)}),
        "elu_pad_fc6_fc7_clf_avgmax": _(
            0.509, 2.19, {"activation": "elu", "average": "scores_and_maximum", "fc_kernels": (3, 1)}
        ),
        "squeeze_fc7_512": _(0.489, 2.3, {"activation": "elu", "fc": (2048, 512), "fc_kernels": (3, 1)}),
        "squeeze_bottleneck_512": _(
            0.49,
            2.28,
            {"activation": "elu", "fc": (2048, 2048, 512), "fc_kernels": (3, 1, 1), "dropout": (0.5, 0.5, 0.2)},
        ),
    },
    "width": {
        "x4sqrt2": _(0.565, 1.96, {"channels": (544, 1448, 2176, 2176, 1448), "fc": 11584}),
        "x4": _(0.563, 1.92, {"channels": (384, 1024, 1536, 1536, 1024), "fc": 8192}),
        "x2sqrt2": _(0.552, 1.94, {"channels": (272, 724, 1088, 1088, 724), "fc": 5792}, "widths inferred"),
        "x2": _(0.533, 2.04, {"channels": (192, 512, 768, 768, 512), "fc": 4096}, "widths inferred"),
        "xsqrt2": _(0.506, 2.17, {"channels": (136, 362, 544, 544, 362), "fc": 2896}),
        "x1": _(0.471, 2.36, {}),
        "x1_sqrt2": _(0.46, 2.41, {"channels": (68, 182, 272, 272, 182), "fc": 1448}, "widths inferred"),
        "x1_2": _(0.416, 2.68, {"channels": (48, 128, 192, 192, 128), "fc": 1024}, "widths inferred"),
        "x1_2sqrt2_nogroup": _(0.34, 3.11, {"channels": (34, 90, 136, 136, 90), "fc": 724, "groups": 1}),
        "x1_2sqrt2": _(0.318, 3.25, {"channels": (34, 90, 136, 136, 90), "fc": 724}, "widths inferred"),
        "x1_4": _(0.256, 3.33, {"channels": (24, 64, 96, 96, 64), "fc": 512}),
        "no_group": _(0.487, 2.26, {"groups": 1}),
    },
    "input_size": {
        "s64": _(0.309, 3.34, {"input_size": 64}),
        "s96": _(0.414, 2.69, {"input_size": 96}),
        "s128": _(0.471, 2.36, {}),
        "s180": _(0.521, 2.1, {"input_size": 180}),
        "s224": _(
            0.565,
            1.87,
            {"input_size": 224, "fc": 4096, "lrn": True},
            "another recipe: crops of 224, 450,000 iterations",
        ),
    },
    "conv1": {
        "k11s4_128": _(0.471, 2.36, {}),
        "k11s8_224": _(0.453, 2.45, {"conv1_stride": 8, "input_size": 224}),
        "k11s5_160": _(0.47, 2.35, {"conv1_stride": 5, "input_size": 160}),
        "k7s3_96": _(0.459, 2.43, {"conv1_kernel": 7, "conv1_stride": 3, "input_size": 96}),
        "k5s2_64": _(0.445, 2.5, {"conv1_kernel": 5, "conv1_stride": 2, "input_size": 64}),
        "k3s1_32": _(0.39, 2.84, {"conv1_kernel": 3, "conv1_stride": 1, "input_size": 32}),
        "k11s4_227_lrn_4096": _(0.565, 1.87, {"input_size": 227, "fc": 4096, "lrn": True}, "another recipe"),
    },
    "conv1_depth": {
        "base": _(0.471, 2.36, {}),
        "nin1": _(0.49, 2.24, {"conv1_depth": 1}),
        "nin3": _(0.509, 2.1, {"conv1_depth": 3}),
        "nin5": _(0.514, 2.11, {"conv1_depth": 5}),
        "nin7": _(0.514, 2.11, {"conv1_depth": 7}),
        "nin9": _(0.516, 2.1, {"conv1_depth": 9}),
        "nin9_residual_276k": _(0.509, 2.13, {"conv1_depth": 9, "conv1_residual": True}, "276,000 iterations"),
        "c3x1": _(0.5, 2.19, {"conv1_depth": 1, "conv1_depth_kernel": 3}),
        "c3x3": _(0.538, 1.99, {"conv1_depth": 3, "conv1_depth_kernel": 3}),
        "c3x5": _(0.551, 1.91, {"conv1_depth": 5, "conv1_depth_kernel": 3}),
    },
    "padding": {
        "conv_padding": _(0.471, 2.36, {}),
        "no_conv_padding": _(0.411, 2.7, {"conv_padding": False, "conv1_stride": 2}),
    },
    "batch_size_scaled_lr": {
        "b1": _(0.474, 2.35),
        "b32": _(0.47, 2.37),
        "b64": _(0.475, 2.34),
        "b128": _(0.47, 2.36),
        "b256": _(0.471, 2.36),
        "b512": _(0.469, 2.37),
        "b1024": _(0.465, 2.38),
    },
    "batch_size_lr001": {
        "b32": _(0.463, 2.4),
        "b64": _(0.471, 2.34),
        "b128": _(0.472, 2.35),
        "b256": _(0.471, 2.36),
        "b512": _(0.455, 2.46),
        "b1024": _(0.419, 2.65),
    },
    "dataset_size": {
        "n1200k": _(0.471, 2.36),
        "n800k": _(0.438, 2.54),
        "n600k": _(0.425, 2.63),
        "n400k": _(0.393, 2.92),
        "n200k": _(0.305, 4.04),
        "n600k_no_scale": _(0.379, 2.92),
        "n400k_no_scale": _(0.357, 3.1),
        "n200k_no_scale": _(0.277, 4.06),
    },
    "label_noise": {
        "p0": _(0.471, 2.36),
        "p5": _(0.458, 2.45),
        "p10": _(0.447, 2.58),
        "p15": _(0.437, 2.69),
        "p50": _(0.347, 3.44),
    },
    "regularisation": {
        "wd5e4": _(0.471, 2.36),
        "wd1e4": _(0.45, 2.48),
        "wd1e5": _(0.45, 2.48),
        "wd1e5_l1": _(0.453, 2.45),
        "drop03": _(0.497, 2.25, {"dropout": 0.3}),
        "drop02": _(0.494, 2.28, {"dropout": 0.2}),
        "drop01": _(0.473, 2.45, {"dropout": 0.1}),
        "fc4096_drop065": _(0.465, 2.38, {"fc": 4096, "dropout": 0.65}),
        "fc6144_drop077": _(0.447, 2.48, {"fc": 6144, "dropout": 0.77}),
        "fc1433_drop0": _(0.456, 2.52, {"fc": 1433, "dropout": 0.0}),
        "conv_dropout": _(0.426, 2.6, {"conv_dropout": (0.0, 0.1, 0.1, 0.2, 0.0)}),
    },
    "bias_lr": {
        "x2": _(0.471, 2.36),
        "x1": _(0.47, 2.37),
        "x5": _(0.472, 2.35),
        "no_bias": _(0.445, 2.5),
    },
    "solver": {
        "sgd": _(0.471, 2.36),
        "nesterov": _(0.473, 2.34),
        "rmsprop_default": _(0.327, 3.2),
        "rmsprop_lr0045_step10k": _(0.453, 2.45),
        "rmsprop_lr01_step10k": _(0.451, 2.43),
        "rmsprop_lr01_step5k": _(0.472, 2.36),
        "rmsprop_lr01_linear": _(0.486, 2.28),
        "sgd_linear": _(0.493, 2.24),
    },
    "augmentation": {
        "default": _(0.471, 2.36),
        "input_drop01_unfinished": _(0.306, 3.56),
        "multiscale": _(0.462, 2.4),
        "rot5": _(0.448, 2.47),
    },
    "all_in": {
        "caffenet128_all": _(
            0.53,
            2.05,
            {"activation": "elu", "pooling": "max_avg", "color": "F", "spp": 3},
            "linear learning rate, Nesterov",
        ),
        "caffenet256_all": _(
            0.613,
            1.64,
            {"input_size": 224, "fc": 4096, "activation": "elu", "pooling": "max_avg", "color": "F", "spp": 3},
            "linear learning rate, Nesterov; crops of 224",
        ),
        "vgg16_128": _(0.651, 1.46, None, "VGG-16 of 128 pixels"),
        "vgg16_128_all": _(0.682, 1.47, None, "VGG-16 of 128 pixels"),
        "caffenet256": _(0.565, 1.87, {"input_size": 224, "fc": 4096, "lrn": True}, "another recipe: crops of 224"),
    },
}

PUBLISHED: dict[str, Variant] = {
    f"{group}/{name}": variant for group, rows in _GROUPS.items() for name, variant in rows.items()
}
