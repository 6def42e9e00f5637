"""The digest by e-mail: who has subscribed, what a mail says, and how mails are sent so that none comes twice."""
