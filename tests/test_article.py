"""The article's own use of its modules, step by step, with the stated corrections."""

import pytest
import torch

import mmfast.nn
from mmfast.models import Decoder, Discriminator, Encoder, Generator

NAMESPACES = [pytest.param(torch.nn, id="torch"), pytest.param(mmfast.nn, id="mmfast")]


@pytest.fixture(autouse=True)
def drawn(seed):
    torch.manual_seed(seed)


@pytest.mark.parametrize("nn", NAMESPACES)
def test_encoders_and_decoders_learn_their_sequences(nn):
    """Image, text and audio encoders at (784, 128), decoders back; a few steps lower every reconstruction error."""
    encoders = [Encoder(784, 128, nn=nn) for _ in range(3)]
    decoders = [Decoder(128, 784, nn=nn) for _ in range(3)]
    sequences = [torch.rand(16, 5, 784), torch.randn(16, 5, 784), torch.rand(16, 5, 784) * 2 - 1]
    parameters = [p for module in (*encoders, *decoders) for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    history = []
    for _ in range(25):
        made = [decode(encode(x), 5) for encode, decode, x in zip(encoders, decoders, sequences, strict=True)]
        losses = [torch.nn.functional.mse_loss(y, x) for y, x in zip(made, sequences, strict=True)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        history.append([loss.detach().item() for loss in losses])
    assert [y.shape for y in made] == [x.shape for x in sequences]
    assert all(last < 0.9 * first for first, last in zip(history[0], history[-1], strict=True)), history


@pytest.mark.parametrize("nn", NAMESPACES)
def test_generator_and_discriminator_train_against_each_other(nn):
    """Each player's own step lowers its own loss, and the generator's picture depends on noise and representation."""
    encoder, generator = Encoder(784, 128, nn=nn), Generator(100 + 128, 28, nn=nn)
    discriminator = Discriminator(28, nn=nn)
    loss = mmfast.nn.AdversarialLoss("non-saturating")
    real, code, z = torch.rand(8, 3, 28, 28) * 2 - 1, encoder(torch.rand(8, 4, 784)).detach(), torch.randn(8, 100)

    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    before = _discriminator_step(loss, optimizer, discriminator, real, generator(z, code).detach())
    after = _discriminator_step(loss, optimizer, discriminator, real, generator(z, code).detach())
    assert after < before

    optimizer = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    losses = []
    for _ in range(2):
        fooled = loss.generator(discriminator(generator(z, code)))
        optimizer.zero_grad()
        fooled.backward()
        optimizer.step()
        losses.append(fooled.detach().item())
    assert losses[1] < losses[0]

    picture = generator(z, code)
    assert picture.shape == (8, 3, 28, 28)
    assert not torch.equal(picture, generator(torch.randn_like(z), code))
    assert not torch.equal(picture, generator(z, code.flip(0)))


def _discriminator_step(loss, optimizer, discriminator, real, fake):
    value = loss.discriminator(discriminator(real), discriminator(fake))
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.detach().item()


def test_encoder_is_the_last_hidden_state():
    encoder, x = Encoder(784, 128), torch.randn(3, 6, 784)
    outputs, _ = encoder.rnn(x)
    assert torch.equal(encoder(x), outputs[:, -1])
    assert not torch.equal(encoder(x), encoder(x[:, :-1]))


def test_decoder_wants_a_step():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Decoder(128, 784)(torch.randn(2, 128), 0)


@pytest.mark.parametrize("size", [4, 28, 32, 64])
@pytest.mark.parametrize("n", [1, 3])
def test_one_logit_per_image(n, size):
    images = torch.rand(n, 3, size, size) * 2 - 1
    discriminator = Discriminator(size)
    logits = discriminator(images)
    assert logits.shape == (n,)
    assert torch.equal(discriminator.probability(images), logits.sigmoid())
    first = discriminator.layers[0]
    assert (first.out_channels, first.kernel_size, first.stride) == (64, (4, 4), (2, 2))


def test_discriminator_refuses_an_image_smaller_than_its_kernel():
    with pytest.raises(ValueError, match="img_size must be at least 4, got 3"):
        Discriminator(3)


@pytest.mark.parametrize("size", [1, 28])
def test_generator_fills_the_image_it_was_made_for(size):
    picture = Generator(7, size)(torch.randn(2, 7))
    assert picture.shape == (2, 3, size, size)
    assert picture.abs().max() <= 1
