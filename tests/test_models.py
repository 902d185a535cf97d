"""The full-size modules: what each is given and makes, and that a code depends on its own row alone."""

import pytest
import torch

import mmfast.nn
from mmfast.models import (
    ConditionalDiscriminator,
    ConditionalGenerator,
    ImageDecoder,
    ImageEncoder,
    Multimodal,
    SpeechDecoder,
    SpeechEncoder,
    TextDecoder,
    TextEncoder,
    combine,
)
from mmfast.models.text import within, written_bytes
from mmfast.train.data import Batch

SIZES = {"size": 8, "mels": 6, "code_size": 16, "noise_size": 4}


@pytest.fixture(autouse=True)
def drawn(seed):
    torch.manual_seed(seed)


def make_batch(rows=4, spoken=(True, False, True, False), size=8, mels=6):
    lengths = torch.randint(1, 12, (rows,))
    frames = torch.randint(3, 20, (rows,))
    lengths[0], frames[0] = 11, 19  # one of each is long enough for its recurrence to have a second step
    frames *= torch.tensor(spoken[:rows])
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    heard = torch.arange(max(1, int(frames.max()))) < frames[:, None]
    return Batch(
        images=torch.rand(rows, 3, size, size) * 2 - 1,
        text=torch.randint(1, 256, inside.shape) * inside,
        text_lengths=lengths,
        speech=torch.randn(*heard.shape, mels) * heard[:, :, None],
        speech_lengths=frames,
    )


@pytest.mark.parametrize("size", [8, 32, 64])
def test_images_both_ways(size):
    images = torch.rand(2, 3, size, size) * 2 - 1
    codes = ImageEncoder(12, size)(images)
    assert codes.shape == (2, 12)
    for picture in (ImageDecoder(12, size)(codes), ConditionalGenerator(5, 12, size)(torch.randn(2, 5), codes)):
        assert picture.shape == images.shape
        assert picture.abs().max() <= 1
    assert ConditionalDiscriminator(12, size)(images, codes).shape == (2,)


@pytest.mark.parametrize("size", [4, 12, 0, -8])
def test_image_size_is_a_power_of_two(size):
    with pytest.raises(ValueError, match=f"a power of two and at least 8, got {size}"):
        ImageEncoder(12, size)


def test_discriminator_looks_at_image_and_code():
    discriminator = ConditionalDiscriminator(12, 8).eval()
    images, codes = torch.rand(3, 3, 8, 8) * 2 - 1, torch.randn(3, 12)
    logits = discriminator(images, codes)
    assert (logits != discriminator(images.flip(3), codes)).all()
    assert (logits != discriminator(images, codes.roll(1, 0))).all()


@pytest.mark.parametrize("extra", [1, 7])
def test_codes_do_not_depend_on_padding_or_neighbours(extra):
    """Each caption alone, unpadded, has the code it has in a batch that is padded further than it must be."""
    batch = make_batch()
    text, speech = TextEncoder(16), SpeechEncoder(16, 6)
    padded = torch.nn.functional.pad
    texts = text(padded(batch.text, (0, extra)), batch.text_lengths)
    heard = batch.speech_lengths > 0
    speeches = speech(padded(batch.speech[heard], (0, 0, 0, extra)), batch.speech_lengths[heard])
    for row, length in enumerate(batch.text_lengths.tolist()):
        alone = text(batch.text[row : row + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(texts[row], alone[0])
    for row, i in enumerate(heard.nonzero().flatten().tolist()):
        frames = batch.speech_lengths[i : i + 1]
        torch.testing.assert_close(speeches[row], speech(batch.speech[i : i + 1, : int(frames)], frames)[0])


@pytest.mark.parametrize("which", ["text", "speech"])
def test_a_code_depends_on_every_step(which):
    batch = make_batch(1, (True,))
    if which == "text":
        encoder, x, lengths = TextEncoder(16), batch.text, batch.text_lengths
    else:
        encoder, x, lengths = SpeechEncoder(16, 6), batch.speech, batch.speech_lengths
    code = encoder(x, lengths)
    for step in range(int(lengths)):
        changed = x.clone()
        changed[:, step] = 255 - changed[:, step] if which == "text" else changed[:, step] + 3
        assert not torch.equal(code, encoder(changed, lengths)), step


def test_text_decoder_guesses_from_code_and_the_bytes_before():
    batch, decoder, codes = make_batch(), TextDecoder(16), torch.randn(4, 16)
    lengths = torch.tensor([5, 4, 7, 3])
    batch.text = torch.randint(1, 256, (4, 7)) * within(lengths, 7)

    def logits_of(codes, text):
        rows = decoder(codes, text, lengths)
        assert rows.shape == (5 + 4 + 7 + 3 + 4, 256)
        return torch.nn.utils.rnn.pad_sequence(rows.split((lengths + 1).tolist()), batch_first=True)

    logits = logits_of(codes, batch.text)
    changed = batch.text.clone()
    changed[:, 2] = 255 - changed[:, 2]
    other = logits_of(codes, changed)
    torch.testing.assert_close(logits[:, :3], other[:, :3])
    assert (logits[:, 3] != other[:, 3]).any(1).all()
    assert (logits[:, 0] != logits_of(codes.roll(1, 0), batch.text)[:, 0]).any(1).all()


def test_written_bytes_are_all_bytes_and_ends():
    text, lengths = torch.tensor([[7, 8, 9], [5, 0, 0]]), torch.tensor([3, 1])
    assert written_bytes(text, lengths).tolist() == [7, 8, 9, 0, 5, 0]


def test_text_decoder_writes_what_it_learned():
    """Two captions, one in another script, learned by heart from two codes, come out byte by byte."""
    decoder, codes, captions = TextDecoder(16, 32, 16), torch.randn(2, 16), ["a red heart", "сердце"]
    rows = [torch.tensor(list(caption.encode())) for caption in captions]
    lengths = torch.tensor([len(row) for row in rows])
    text = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(decoder(codes, text, lengths), written_bytes(text, lengths))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert decoder.write(codes, 20) == captions
    assert decoder.write(codes, 5) == [
        captions[0][:5],
        captions[1][:2],
    ]  # the third letter is cut in its middle and dropped


@pytest.mark.parametrize("frames", [1, 8, 21])
def test_speech_decoder_makes_as_many_frames_as_asked(frames):
    decoder, codes = SpeechDecoder(16, 6).eval(), torch.randn(3, 16)
    made = decoder(codes, frames)
    assert made.shape == (3, frames, 6)
    assert (made != decoder(codes.roll(1, 0), frames)).any()
    assert frames == 1 or (made[:, 0] != made[:, -1]).any()


def test_combine_is_the_mean_of_what_is_present():
    codes, present = torch.randn(8, 3, 5), torch.tensor([[i & 1, i & 2, i & 4] for i in range(8)]).bool()
    codes[~present] = float("nan")
    expected = torch.stack([codes[i][present[i]].mean(0) if i else torch.zeros(5) for i in range(8)])
    torch.testing.assert_close(combine(codes, present), expected)


@pytest.mark.parametrize("spoken", [(True, False, True, False), (False,) * 4], ids=["some-spoken", "none-spoken"])
def test_multimodal_uses_the_modalities_it_may(spoken):
    model, batch, noise = Multimodal(**SIZES).eval(), make_batch(4, spoken), torch.randn(4, 4)
    image, text, speech = torch.eye(3).bool()
    codes, present = model.encode(batch)
    assert present.tolist() == [[True, True, heard] for heard in spoken]
    for wanted, taken in ((image, codes[:, 0]), (text, codes[:, 1]), (image | text, codes[:, :2].mean(1))):
        torch.testing.assert_close(model(batch, noise, wanted.expand(4, 3)).condition, taken)
    output = model(batch, noise, speech.expand(4, 3))
    falls_back = torch.where(torch.tensor(spoken)[:, None], codes[:, 2], codes[:, 1])
    torch.testing.assert_close(output.condition, falls_back)
    assert output.speech.shape == (max(1, sum(spoken)), batch.speech.shape[1], 6)
    assert output.picture.shape == output.image.shape == batch.images.shape


def test_every_weight_is_trained():
    """Every parameter gets a gradient from the outputs, in a batch where some rows are spoken."""
    model, batch = Multimodal(**SIZES), make_batch()
    output = model(batch, torch.randn(4, 4), torch.rand(4, 3) < 0.5)
    sum((x * torch.randn_like(x)).sum() for x in (output.picture, output.image, output.text, output.speech)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize(
    "build", [lambda nn: Multimodal(**SIZES, nn=nn), lambda nn: ConditionalDiscriminator(16, 8, nn=nn)]
)
def test_state_dicts_are_interchangeable(build):
    """Weights go from torch.nn to mmfast.nn and back, strictly, and give the same numbers."""
    plain, fast = build(torch.nn).eval(), build(mmfast.nn).eval()
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in fast.state_dict().items()}
    fast.load_state_dict(plain.state_dict())
    batch = make_batch()
    if isinstance(plain, Multimodal):
        noise, wanted = torch.randn(4, 4), torch.rand(4, 3) < 0.5
        for a, b in zip(plain(batch, noise, wanted), fast(batch, noise, wanted), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    else:
        codes = torch.randn(4, 16)
        torch.testing.assert_close(plain(batch.images, codes), fast(batch.images, codes))
    plain.load_state_dict(fast.state_dict())


def test_all_layers_come_from_the_namespace():
    """A namespace that counts what is taken from it accounts for every leaf module."""
    made = []

    class Counting:
        def __getattr__(self, name):
            value = getattr(torch.nn, name)
            if not (isinstance(value, type) and issubclass(value, torch.nn.Module)):
                return value

            def build(*args, **kwargs):
                made.append(value(*args, **kwargs))
                return made[-1]

            return build

    for model in (Multimodal(**SIZES, nn=Counting()), ConditionalDiscriminator(16, 8, nn=Counting())):
        own = [
            m for m in model.modules() if type(m).__module__.startswith("torch.nn.modules") and not list(m.children())
        ]
        assert own and all(any(m is x for x in made) for m in own)
