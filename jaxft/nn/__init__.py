"""Models, the only package that imports flax: encoders, decoders, checkpoints, LoRA, MLPs, conv nets, attention."""

from jaxft.nn.capture import LayerOutputs, make_layer_outputs
from jaxft.nn.conv import VGG16_WIDTHS, ConvConfig, ConvNet, make_convnet
from jaxft.nn.convolution import same_convolution
from jaxft.nn.decoder import Decoder, DecoderConfig, decoder_config, init_decoder, unembedding_table
from jaxft.nn.decoder_outputs import (
    make_first_token_logits,
    make_hidden_states,
    make_next_token_logits,
    make_response_log_probs,
    make_response_states,
    make_response_token_log_probs,
)
from jaxft.nn.factored import Factored, factored, linen_outputs
from jaxft.nn.generation import Generation, generate
from jaxft.nn.lora import init_lora, make_adapted_outputs, make_lora_outputs, merge_lora
from jaxft.nn.mlp import MLP, make_mlp, make_mlp_units
from jaxft.nn.outputs import (
    make_class_logits,
    make_features,
    make_mlm_logits,
    make_prompt_logits,
    make_tied_logits,
)
from jaxft.nn.pretrained import Pretrained, load_encoder, save_encoder
from jaxft.nn.pretrained_decoders import load_decoder, save_decoder
from jaxft.nn.relu_attention import (
    AttentionStage,
    FeedForward,
    ReluAttention,
    ReluAttentionConfig,
    ReluAttentionStates,
    make_relu_attention,
)
from jaxft.nn.rope import RopeScaling
from jaxft.nn.tape import TAP_AXES, Tape, tape_of
from jaxft.nn.token_outputs import make_token_log_probs
from jaxft.nn.transformer import Encoder, EncoderConfig, MLMHead, init_classifier, init_encoder
from jaxft.nn.unit_specs import conv_spec, encoder_spec, mlp_spec

__all__ = [
    "MLP",
    "TAP_AXES",
    "VGG16_WIDTHS",
    "AttentionStage",
    "ConvConfig",
    "ConvNet",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "Factored",
    "FeedForward",
    "Generation",
    "LayerOutputs",
    "MLMHead",
    "Pretrained",
    "ReluAttention",
    "ReluAttentionConfig",
    "ReluAttentionStates",
    "RopeScaling",
    "Tape",
    "conv_spec",
    "decoder_config",
    "encoder_spec",
    "factored",
    "generate",
    "init_classifier",
    "init_decoder",
    "init_encoder",
    "init_lora",
    "linen_outputs",
    "load_decoder",
    "load_encoder",
    "make_adapted_outputs",
    "make_class_logits",
    "make_convnet",
    "make_features",
    "make_first_token_logits",
    "make_hidden_states",
    "make_layer_outputs",
    "make_lora_outputs",
    "make_mlm_logits",
    "make_mlp",
    "make_mlp_units",
    "make_next_token_logits",
    "make_prompt_logits",
    "make_relu_attention",
    "make_response_log_probs",
    "make_response_states",
    "make_response_token_log_probs",
    "make_tied_logits",
    "make_token_log_probs",
    "merge_lora",
    "mlp_spec",
    "same_convolution",
    "save_decoder",
    "save_encoder",
    "tape_of",
    "unembedding_table",
]
