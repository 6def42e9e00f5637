"""What a mail says, and how one is handed to a mail server."""

from __future__ import annotations

import hashlib
import ipaddress
import smtplib
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from urllib.parse import urlsplit

from ...core.errors import BadInputError, EverytokenError
from ..page.feed import check_base, plain
from ..page.render import environment
from .store import Subscriber

TIME_LIMIT = 20.0
"""Seconds that a mail server may take for an answer."""
MOST_TEXT = 600
"""Letters of a paper's text in a mail."""


@dataclass(frozen=True)
class Paper:
    """A paper in a digest.

    Attributes:
        key: what makes it the same paper in every digest, such as ``card:dyspec`` or ``arxiv:2410.11744``.
        title, text: plain text.
        link: where to read it; only https addresses, and those of the site, become links.
        topics: stations that it belongs to.
    """

    key: str
    title: str
    text: str
    link: str
    topics: tuple[str, ...]


@dataclass(frozen=True)
class Sender:
    """Who sends the digest.

    Args:
        address: in From; the digest's own.
        base: the https address of the server (``papers serve``) that confirms and unsubscribes.
        contact: a postal address or another line by which the sender is reached; it stands under every mail.

    Raises:
        BadInputError: an address that is none, a base that is no https address (http only on loopback), no contact.
    """

    address: str
    base: str
    contact: str

    def __post_init__(self) -> None:
        from .store import clean_address

        clean_address(self.address)
        check_base(self.base)
        parts = urlsplit(self.base)
        if parts.scheme != "https" and not (parts.scheme == "http" and loopback(parts.hostname or "")):
            raise BadInputError(
                f"{self.base or 'No address'} cannot stand in mails: links to confirm and unsubscribe need https.",
                "Give --base-url https://... (http is taken on loopback only).",
            )
        if not plain(self.contact):
            raise BadInputError("A mail must say who sent it.", "Give --contact with a postal address or another line.")

    @property
    def domain(self) -> str:
        return self.address.rpartition("@")[2].lower()


def loopback(host: str) -> bool:
    """Whether a host name or address is this machine itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def message_id(subscriber: Subscriber, day: str, sender: Sender) -> str:
    """The same for every attempt to send a day's digest to a subscriber."""
    mark = hashlib.sha256(f"{subscriber.id} {day} {sender.address}".encode()).hexdigest()[:12]
    return f"<digest.{day}.{subscriber.id}.{mark}@{sender.domain}>"


def _message(sender: Sender, to: str, subject: str, now: datetime) -> EmailMessage:
    message = EmailMessage(policy=SMTP)  # refuses line ends in headers
    message["From"] = Address("everytoken papers", addr_spec=sender.address)
    message["To"] = Address(addr_spec=to)  # refuses a list
    message["Subject"] = plain(subject, 150)
    message["Date"] = format_datetime(now)
    message["Auto-Submitted"] = "auto-generated"
    return message


def _fill(message: EmailMessage, name: str, **values: object) -> None:
    """Both bodies. Text is not escaped, for it is no HTML; the HTML is."""
    templates = environment()
    text = templates.overlay(autoescape=False).get_template(f"{name}.txt")
    message.set_content(text.render(**values), cte="quoted-printable")
    message.add_alternative(
        templates.get_template(f"{name}.html").render(**values), subtype="html", cte="quoted-printable"
    )


def confirmation(sender: Sender, address: str, token: str, now: datetime) -> EmailMessage:
    """The mail that asks whether a subscription is wanted; it says nothing else."""
    message = _message(sender, address, "Confirm your subscription", now)
    message["Message-ID"] = f"<confirm.{hashlib.sha256(token.encode()).hexdigest()[:24]}@{sender.domain}>"
    link = f"{check_base(sender.base)}/confirm/{token}"
    _fill(message, "confirm", link=link, contact=plain(sender.contact), host=urlsplit(sender.base).netloc)
    return message


def digest(
    sender: Sender, subscriber: Subscriber, papers: Sequence[Paper], token: str, day: str, now: datetime
) -> EmailMessage:
    """A day's digest.

    The relay must sign it by DKIM so that the signature covers ``List-Unsubscribe`` and ``List-Unsubscribe-Post`` (RFC
    8058); ``uncovered`` checks a mail that has arrived.

    Args:
        token: unsubscribes.

    Raises:
        ValueError: the subscriber's address is not exactly one address.
    """
    noun = "paper" if len(papers) == 1 else "papers"
    message = _message(sender, subscriber.address, f"{len(papers)} new {noun}: {papers[0].title}", now)
    message["Message-ID"] = message_id(subscriber, day, sender)
    message["List-Id"] = f"everytoken papers <papers.{sender.domain}>"
    link = f"{check_base(sender.base)}/unsubscribe/{token}"
    message["List-Unsubscribe"] = f"<{link}>, <mailto:{sender.address}?subject=unsubscribe>"
    message["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    shown = [
        {
            "title": plain(item.title, 300),
            "text": plain(item.text, MOST_TEXT),
            "link": _link(item.link, sender),
            "topics": item.topics,
        }
        for item in papers
    ]
    _fill(
        message,
        "digest",
        papers=shown,
        noun=noun,
        day=day,
        leave=link,
        contact=plain(sender.contact),
        topics=subscriber.topics,
        frequency=subscriber.frequency,
        host=urlsplit(sender.base).netloc,
    )
    return message


def _link(link: str, sender: Sender) -> str:
    """An https address, or one of the site itself; else nothing."""
    from ..page.render import web

    base = check_base(sender.base)
    return link if link.isprintable() and link.startswith(f"{base}/") else web(link)


def uncovered(message: EmailMessage) -> list[str]:
    """Which of the two headers of one-click unsubscribing no DKIM signature of a received mail covers.

    It reads what a signature says that it covers; it does not check the signature itself.
    """
    wanted = ["list-unsubscribe", "list-unsubscribe-post"]
    for signature in message.get_all("DKIM-Signature", []):
        fields = dict(part.strip().partition("=")[::2] for part in str(signature).split(";"))
        covered = {name.strip().lower() for name in fields.get("h", "").split(":")}
        if covered.issuperset(wanted):
            return []
    return wanted


@dataclass(frozen=True)
class MailServer:
    """Where mails are handed in.

    Args:
        host, port: of the relay; 465 speaks TLS from the start, every other port by STARTTLS.
        user, password: where the relay asks for them; never sent without TLS.
        context: what TLS trusts; default the system's authorities.
    """

    host: str
    port: int = 587
    user: str = ""
    password: str = ""
    context: ssl.SSLContext | None = None
    time_limit: float = TIME_LIMIT

    def connect(self) -> smtplib.SMTP:
        """A connection that is ready to send.

        Raises:
            EverytokenError: the server cannot be reached, offers no TLS (taken on loopback only), or refuses the login.
        """
        context = self.context or ssl.create_default_context()
        try:
            if self.port == 465:
                return self._login(
                    smtplib.SMTP_SSL(self.host, self.port, timeout=self.time_limit, context=context), True
                )
            made = smtplib.SMTP(self.host, self.port, timeout=self.time_limit)
            made.ehlo()
            secure = made.has_extn("starttls")
            if secure:
                made.starttls(context=context)
                made.ehlo()
            elif not loopback(self.host):
                made.close()
                raise EverytokenError(
                    f"{self.host} offers no STARTTLS, so addresses would travel in the clear.",
                    "Use another relay or port 465.",
                )
            return self._login(made, secure)
        except OSError as error:  # smtplib's errors are of this kind too
            raise EverytokenError(f"The mail server {self.host}:{self.port} cannot be used: {error}.") from error

    def _login(self, made: smtplib.SMTP, secure: bool) -> smtplib.SMTP:
        if self.user:
            if not secure:
                made.close()
                raise EverytokenError("A password is not sent without TLS.", "Use a relay with STARTTLS.")
            made.login(self.user, self.password)
        return made
