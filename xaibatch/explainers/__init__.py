"""Explainers: one file each, registered by name; importing this package registers all built-in ones."""

from xaibatch.explainers import attention_gradient as attention_gradient
from xaibatch.explainers import attention_rollout as attention_rollout
from xaibatch.explainers import attn_lrp as attn_lrp
from xaibatch.explainers import gradcam as gradcam
from xaibatch.explainers import input_gradient as input_gradient
from xaibatch.explainers import kernel_shap as kernel_shap
from xaibatch.explainers import lime as lime
from xaibatch.explainers import occlusion as occlusion
from xaibatch.explainers import random_map as random_map
from xaibatch.explainers import raw_attention as raw_attention
from xaibatch.explainers import rise as rise
from xaibatch.explainers import transformer_lrp as transformer_lrp
