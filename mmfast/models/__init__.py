"""The multimodal GAN of the source article: its own small modules, and the full-size ones that `mmfast train` uses.

The idea: encoders turn image, text and audio into one representation, h = E(x); decoders turn it back into its
modality, x' = D(h); a generator makes an image from noise and that representation, x' = G(z, h); a discriminator
says how real an image is; generator and discriminator are trained against each other.

Every module takes `nn=`, the namespace that ALL its layers come from: `torch.nn` (default) or `mmfast.nn`. Both give
the same `state_dict` keys and shapes, so weights move freely between them.
"""

from mmfast.models.adversaries import ConditionalDiscriminator, ConditionalGenerator
from mmfast.models.article import Decoder, Discriminator, Encoder, Generator
from mmfast.models.article_gan import ArticleDiscriminator, ArticleModel
from mmfast.models.image import ImageDecoder, ImageEncoder
from mmfast.models.multimodal import MODALITIES, Multimodal, Output, combine
from mmfast.models.speech import SpeechDecoder, SpeechEncoder
from mmfast.models.text import TextDecoder, TextEncoder

__all__ = [
    "MODALITIES",
    "ArticleDiscriminator",
    "ArticleModel",
    "ConditionalDiscriminator",
    "ConditionalGenerator",
    "Decoder",
    "Discriminator",
    "Encoder",
    "Generator",
    "ImageDecoder",
    "ImageEncoder",
    "Multimodal",
    "Output",
    "SpeechDecoder",
    "SpeechEncoder",
    "TextDecoder",
    "TextEncoder",
    "combine",
]
