"""GLM-4.5 and DeepSeek-V3, which share their module names: ``model.layers.{L + i}`` after the trunk's ``L`` layers."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Tensor
from mtp_modules.interop.conventions import Conventions, Takes
from mtp_modules.interop.format import Format, Wanted, attach_heads, fill
from mtp_modules.interop.latents import EPS
from mtp_modules.interop.layers import Experts, LayerShape, LayerStyle, shape_of
from mtp_modules.interop.sequential import (
    ModuleNames,
    build_heads,
    check_sizes,
    conventions_of,
    read_modules,
    sequential_heads,
    write_modules,
)
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import (
    Sizes,
    field,
    read_sizes,
    read_trunk,
    transformer_trunk,
    trunk_config,
    write_trunk,
)
from mtp_modules.model import MTPModel


class NextPredict(Format):
    """SequentialHeads and their trunk, under DeepSeek-V3's names for MTP modules.

    Readers build every module with a mixture of experts, and vLLM needs one in the trunk too. The feed-forward layers
    of the modules and of the trunk's last layer are written as shared experts, and the routed experts output 0.

    Attributes:
        style: Layer style of the trunk.
    """

    keeps_trunk = True
    method = "mtp"
    vllm_masks_first = True
    style: ClassVar[LayerStyle]
    takes: ClassVar[Takes] = {
        "concatenation": ("embedding_first",),
        "trunk_state": ("after_norm",),
        "chain_state": ("before_norm", "after_norm"),
        "position_0": ("token", "zero"),
    }

    @abstractmethod
    def attention(self, shape: LayerShape, norm_eps: float) -> dict[str, Any]:
        """Return the configuration entries of attention and of the model type.

        Args:
            shape: Sizes of the trunk's layers.
            norm_eps: Epsilon of every norm.

        Raises:
            ValueError: If the format cannot represent our attention.
        """

    @abstractmethod
    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        """Read the sizes of a model.

        Args:
            config: Content of ``config.json``.

        Raises:
            ValueError: If our layers cannot represent the model's.
        """

    def conventions(self, model: MTPModel) -> Conventions:
        """Return the conventions of a model's heads."""
        return conventions_of(sequential_heads(self.name, model))

    def trunk(self, model: MTPModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the trunk as dense layers before one with experts."""
        config = trunk_config(self.name, model, self.style)
        width = shape_of(sequential_heads(self.name, model).steps[0].layer).ffn_width
        if width != config["intermediate_size"]:
            refuse(
                self.name,
                "experts of the modules and of the trunk's last layer have one size in this format, but ffn_width is "
                f"{width} for the heads and {config['intermediate_size']} for the trunk; train heads with the "
                "ffn_width of the trunk.",
            )
        routed = math.gcd(width, 64)
        config |= self.attention(shape_of(transformer_trunk(self.name, model).layers[0]), config["rms_norm_eps"])
        config |= {
            "first_k_dense_replace": config["num_hidden_layers"] - 1,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "n_shared_experts": width // routed,
            "moe_intermediate_size": routed,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        }
        last = self.style._replace(experts=_experts(self.name, config))
        return write_trunk(self.name, model, self.style, last=last), config

    def heads(self, model: MTPModel, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the modules. Each has a copy of the embedding and the output matrix, which some readers require.

        An output matrix that is the embedding is written too, because vLLM does not tie them in these architectures.
        """
        heads = sequential_heads(self.name, model)
        sizes = self.sizes(config)
        check_sizes(self.name, model, heads, sizes, any_ffn=True)
        experts = _experts(self.name, config)
        width = shape_of(heads.steps[0].layer).ffn_width
        if width != experts.width * experts.shared:
            refuse(
                self.name,
                f"the modules' ffn_width is {width}, the shared expert of this model is {experts.width} x "
                f"{experts.shared} wide; train heads of that ffn_width.",
            )
        names = _names(sizes.num_layers)
        written = write_modules(self.name, heads, names, self.style._replace(experts=experts))
        for index in range(len(heads.steps)):
            written[f"{names(index).layer}embed_tokens.weight"] = _embedding(model)
            written[f"{names(index).layer}shared_head.head.weight"] = model.unembedding.weight
        if model.unembedding.tied:
            written["lm_head.weight"] = model.unembedding.weight
        return written, {"num_nextn_predict_layers": len(heads.steps)}

    def read(self, tensors: Tensors, config: Mapping[str, Any], wanted: Wanted) -> MTPModel:
        """Build a model from a checkpoint; see :class:`~mtp_modules.interop.format.Format`."""
        sizes = self.sizes(config)
        count = field(self.name, config, "num_nextn_predict_layers")
        names, experts = _names(sizes.num_layers), _experts(self.name, config)
        shape = sizes.layer._replace(ffn_width=experts.width * experts.shared)
        trunk, state = None, dict[str, Tensor]()
        if wanted.trunk is None:
            dense = field(self.name, config, "first_k_dense_replace", 0)
            if dense < sizes.num_layers - 1 or (dense < sizes.num_layers and shape != sizes.layer):
                refuse(self.name, "layers of the trunk are mixtures of experts, which ours do not support; give trunk.")
            last = self.style._replace(experts=experts) if dense < sizes.num_layers else None
            trunk, state = read_trunk(tensors, sizes, self.style, last=last)
            embedding, output = state["trunk.embedding.weight"], state["unembedding.weight"]
        else:
            embedding, output = _embedding(wanted.trunk), wanted.trunk.unembedding.weight
        for index in range(count):
            prefix = names(index).layer
            tensors.same(f"{prefix}embed_tokens.weight", embedding, "model.embed_tokens.weight")
            tensors.same(f"{prefix}shared_head.head.weight", output, "the output matrix")
        read = read_modules(tensors, names, count, self.style._replace(experts=experts), shape)
        heads = build_heads(self.name, sizes, shape, wanted.conventions, count=count, num_horizons=wanted.num_horizons)
        if trunk is None:
            _drop_trunk(tensors, sizes.num_layers)
            return attach_heads(self.name, wanted.trunk, heads, read)
        return fill(trunk, heads, state | read, tie_embeddings=sizes.tied)


class GLM(NextPredict):
    """GLM-4.5."""

    name = "glm"
    model_types = ("glm4_moe",)
    vllm_chain = "before_norm"
    style = LayerStyle()

    def attention(self, shape: LayerShape, norm_eps: float) -> dict[str, Any]:
        """Return the configuration entries of attention and of the model type."""
        return {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "use_qk_norm": shape.qk_norm}

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        """Read the sizes of a model."""
        return read_sizes(
            self.name, config, qk_norm=field(self.name, config, "use_qk_norm", False), rotary_fraction=0.5
        )


class DeepSeek(NextPredict):
    """DeepSeek-V3, whose multi-head latent attention equals ours if all queries share one key-value head.

    See :mod:`mtp_modules.interop.latents`.
    """

    name = "deepseek"
    model_types = ("deepseek_v3",)
    vllm_chain = "after_norm"
    vllm_notes = (
        "vLLM 0.32 loads this format on a CPU, but gives other tokens there, and no GPU was tried: to serve on a CPU, "
        "export the same heads in the format glm.",
    )
    style = LayerStyle(latent=True, qk_norm=False)

    def attention(self, shape: LayerShape, norm_eps: float) -> dict[str, Any]:
        """Return the configuration entries of attention and of the model type."""
        if shape.num_kv_heads != 1:
            refuse(
                self.name,
                f"all queries of this format share one rotated key, the layers have num_kv_heads="
                f"{shape.num_kv_heads}; build trunk and heads with num_kv_heads=1.",
            )
        if norm_eps != EPS:
            refuse(
                self.name,
                f"the norm of latents adds {EPS} in transformers and the eps of all norms in vLLM, and norm_eps is "
                f"{norm_eps}; build trunk and heads with norm_eps={EPS}.",
            )
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_key_value_heads": shape.num_heads,
            "q_lora_rank": None,
            "kv_lora_rank": shape.d_model,
            "qk_rope_head_dim": shape.head_dim,
            "qk_nope_head_dim": 0,
            "v_head_dim": shape.head_dim,
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        }

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        """Read the sizes of a model."""
        sizes = read_sizes(self.name, config, qk_norm=False)
        ours = self.attention(sizes.layer._replace(num_kv_heads=1), sizes.norm_eps)
        for name in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
            if (value := config.get(name)) != ours[name]:
                refuse(
                    self.name,
                    f"config.json has {name}={value}, our layers can represent latents with {ours[name]} only; "
                    "this model cannot be read.",
                )
        return sizes._replace(layer=sizes.layer._replace(num_kv_heads=1))


def _embedding(model: MTPModel) -> Tensor:
    weight: Tensor = model.trunk.embedding.weight  # type: ignore[assignment]
    return weight


def _experts(owner: str, config: Mapping[str, Any]) -> Experts:
    num, width, shared = (
        field(owner, config, name) for name in ("n_routed_experts", "moe_intermediate_size", "n_shared_experts")
    )
    return Experts(num, width, shared)


def _names(num_layers: int) -> Callable[[int], ModuleNames]:
    def of(index: int) -> ModuleNames:
        prefix = f"model.layers.{num_layers + index}."
        return ModuleNames(
            token_norm=f"{prefix}enorm.weight",
            state_norm=f"{prefix}hnorm.weight",
            merge=f"{prefix}eh_proj.weight",
            out_norm=f"{prefix}shared_head.norm.weight",
            layer=prefix,
        )

    return of


def _drop_trunk(tensors: Tensors, num_layers: int) -> None:
    """Ignore the trunk's tensors."""
    for prefix in (
        "model.embed_tokens.",
        "model.norm.",
        "lm_head.",
        *(f"model.layers.{i}." for i in range(num_layers)),
    ):
        tensors.drop(prefix)
