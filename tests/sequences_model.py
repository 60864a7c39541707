"""The model of sequences.py: who owns which address, by policy. It knows no rule.

What was learned ends at some time. The model knows when it sent a frame and when the frame had arrived, so it has two
times for each entry: it is there until the first, and it is not there after the second.
"""

from ipaddress import ip_address, ip_network
from typing import NamedTuple

from fuzz_judge import eui64
from fuzz_judge import ip as packed

MACS = {
    who: bytes.fromhex(f"10666a4ca1{end}") for who, end in zip("habvrlc", ("fe", "0a", "0b", "11", "01", "02", "15"))
}
NAMES = {mac.hex(":"): who for who, mac in MACS.items()}
PREFIXES = "fe80::", "2001:67c:83::"  # where addresses are claimed: link-local ones, and those of INSTANCES_SLAAC
NO, MAYBE, YES = 0, 1, 2
SLACK = 0.02


class Now(NamedTuple):
    """The time of something: not before, and not after."""

    begin: float
    end: float


def made(prefix: str, who: str) -> str:
    """Return the address made from somebody's MAC address (RFC 4291, appendix A)."""
    return str(ip_address(eui64(MACS[who], packed(prefix)[:8])))


def is_claimed(address: str) -> bool:
    """Tell whether an address is of a kind that belongs to who uses it first."""
    octets = packed(address)
    return octets[:8] in [packed(prefix)[:8] for prefix in PREFIXES] and octets[11:13] != b"\xff\xfe"


class Model:
    """Who owns what. Registered, leased, elsewhere, claimed: this is the order."""

    def __init__(self, server: str, claim: float, lease: float):
        self.server, self.claim_time, self.lease_time = server, claim, lease
        self.owned, self.networks, self.leases, self.elsewhere, self.claims = {}, {}, {}, {}, {}

    def load(self, registry: dict) -> None:
        """Note that a registry is in force. It goes before what was learned; whoever has left it may have lost that."""
        left, self.owned, self.networks = set(self.owned), {}, {}
        for mac, entry in registry.items():
            allowed = [ip_network(text) for text in entry.get("allowed", ())]
            fields = {text for field, text in entry.items() if field.startswith("ip")}
            self.owned[NAMES[mac]] = fields | {str(network[0]) for network in allowed if network.num_addresses == 1}
            self.networks[NAMES[mac]] = [network for network in allowed if network.num_addresses > 1]
        for learned in (self.leases, self.claims):
            for address, owners in learned.items():
                for who, (_, until) in owners.items():
                    if who in left - {*self.owned} or self.holders(address):
                        owners[who] = (0, until)

    def holders(self, address: str) -> set[str]:
        """Return those who are registered with an address, or allowed it."""
        return {who for who, addresses in self.owned.items() if address in addresses}

    def standing(self, who: str, address: str, now: Now) -> int:
        """Tell whether an address is somebody's, or may be claimed: NO, MAYBE, YES."""
        if holders := self.holders(address):
            return YES if who in holders else NO
        if ":" not in address:
            sure, possible = self.leases.get(address, {}).get(who, (0, 0))
            return YES if now.end < sure else MAYBE if now.begin < possible else NO
        if not is_claimed(address):
            return YES if address in [made(prefix, who) for prefix in PREFIXES] else NO
        sure, possible = self.living(self.elsewhere, address, now)
        if sure or possible:
            return YES if who in sure else MAYBE if who in possible or not sure else NO
        sure, possible = self.living(self.claims, address, now)
        return NO if sure - {who} else MAYBE if possible - {who} else YES

    @staticmethod
    def living(learned: dict, address: str, now: Now) -> tuple[set, set]:
        """Return those who certainly have an address now, and those who may have it."""
        owners = learned.get(address, {}).items()
        return {w for w, times in owners if now.end < times[0]}, {w for w, times in owners if now.begin < times[1]}

    def has(self, who: str, address: str, now: Now) -> bool:
        """Tell whether somebody certainly has an address already, by claim or since it is elsewhere."""
        return any(who in self.living(learned, address, now)[0] for learned in (self.claims, self.elsewhere))

    def may_send(self, who: str, address: str, now: Now, joins: bool) -> int:
        """Tell whether somebody may send from an address, all or what a newcomer joins by."""
        if any(ip_address(address) in network for network in self.networks.get(who, ())):
            return YES
        newcomer = address.startswith("fe80:") and who not in self.owned
        return NO if newcomer and not joins else self.standing(who, address, now)

    def may_ask(self, who: str, address: str, now: Now) -> int:
        """Tell whether somebody may ask by ARP from an address: a router may from its networks, as Linux does."""
        free = not self.holders(address)
        return self.may_send(who, address, now, False) if free else self.standing(who, address, now)

    def use(self, who: str, addresses: list[str], now: Now, arrived: bool, renews: bool) -> None:
        """Note which addresses a guest's frame has claimed: surely if it arrived, else perhaps."""
        for address in addresses:
            if not is_claimed(address) or self.holders(address) or self.standing(who, address, now) == NO:
                continue
            owners = self.claims.setdefault(address, {})
            sure, possible = owners.get(who, (0, 0))
            if arrived:
                owners.clear()
                sure = now.begin + self.claim_time if renews or now.begin > possible else sure
            owners[who] = (sure, now.end + self.claim_time)

    def learn(self, who: str, addresses: list[str], now: Now) -> None:
        """Note addresses that the host or somebody behind an uplink has shown to be its own."""
        for address in filter(is_claimed, addresses):
            self.elsewhere.setdefault(address, {})[who] = (now.begin + self.claim_time, now.end + self.claim_time)

    def probe(self, who: str, address: str, now: Now) -> None:
        """Note an address for which somebody there detects duplicates, unless a guest has claimed it."""
        sure, possible = self.living(self.claims, address, now)
        before = self.elsewhere.get(address, {}).get(who, (0, 0))
        if not sure:
            self.learn(who, [address], now)
        if possible and not sure and is_claimed(address):
            self.elsewhere[address][who] = (before[0], now.end + self.claim_time)

    def lease(self, who: str, address: str, now: Now) -> None:
        """Note a lease, unless the address is somebody's. Whoever had it leased before may still have it."""
        if address != "0.0.0.0" and not self.holders(address):
            owners = {other: (0, until) for other, (_, until) in self.leases.get(address, {}).items()}
            owners[who] = (now.begin + self.lease_time, now.end + self.lease_time)
            self.leases[address] = owners
