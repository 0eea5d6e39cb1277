"""What can be wrong with certificates and names, each its own exception."""

from __future__ import annotations


class LinkError(ValueError):
    """Certificates or names cannot be used as asked; base of all errors here."""


class CertificateError(LinkError):
    """A certificate cannot be made, or a folder of certificates cannot be written."""


class CredentialsError(LinkError):
    """The folder of a site does not hold what a connection needs."""


class IdentityError(LinkError):
    """A peer's certificate does not say who it is."""


class AllowListError(LinkError):
    """The list of clients is not one."""


class RevokedError(LinkError):
    """The list of revoked certificates is not one."""
