# What the three programs share: the named instances of a registry, as {name, wan: [addresses], lan: [addresses]}.
# Global addresses are wan; unique local ones and private IPv4 (RFC 1918) are lan.
def is_private: test("^(10\\.|192\\.168\\.|172\\.(1[6-9]|2[0-9]|3[01])\\.)");
def address: strings | select(test("\\A[0-9a-f.:]+\\z"));
def instances:
    to_entries[].value
    | select(.name | strings | test("\\A[A-Za-z]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\\z"))
    | {
        name,
        wan: [(.ipv4 | address | select(is_private | not)), (.ipv6_gua | address)],
        lan: [(.ipv4 | address | select(is_private)), (.ipv6_ula | address)]
    };
