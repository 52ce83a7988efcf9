//! Where a request came from.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use super::room::Holder;

/// Where a request came from, as far as that is known.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Arrival {
    /// The address that the server listens on. A Unix socket has none.
    pub(crate) listening: Option<IpAddr>,
    /// The address of the client, or of the last proxy.
    pub(crate) peer: Option<IpAddr>,
    /// The number of the connection, which no other one has.
    pub(crate) connection: Option<u64>,
    /// Whether it came by TLS of this server's own.
    pub(crate) is_tls: bool,
}

impl Arrival {
    /// Who holds the bodies of a request. A peer on loopback is a proxy that speaks for many.
    pub(crate) fn holder(self) -> Holder {
        let peer = self.peer.map(Peer::of);
        Holder {
            connection: self.connection,
            peer: peer.filter(|peer| !peer.is_loopback()),
        }
    }
}

/// The origin of a connection: an IPv4 address, or an IPv6 `/64` network, which one host can have
/// to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Peer(IpAddr);

impl Peer {
    pub(crate) fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(address) => {
                let network = address.to_bits() & !u128::from(u64::MAX);
                // Loopback is a single address, not a network.
                let loopback = address.is_loopback();
                let network = Ipv6Addr::from_bits(network);
                IpAddr::V6(if loopback { address } else { network })
            }
            address => address,
        })
    }

    /// Whether the connection came from this machine.
    pub(crate) fn is_loopback(self) -> bool {
        self.0.is_loopback()
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(address: &str) -> Peer {
        Peer::of(address.parse().unwrap())
    }

    #[test]
    fn an_ipv6_host_is_one_peer_whatever_addresses_it_takes() {
        assert_eq!(peer("2001:db8::1"), peer("2001:db8:0:0:ffff:ffff:1:2"));
        assert_ne!(peer("2001:db8::1"), peer("2001:db8:0:1::1"));
        assert_eq!(peer("::ffff:192.0.2.1"), peer("192.0.2.1"));
        assert_ne!(peer("192.0.2.1"), peer("192.0.2.2"));
        assert!(peer("::1").is_loopback() && peer("::ffff:127.0.0.1").is_loopback());
    }
}
