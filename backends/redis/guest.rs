//! A handle with a guest's credential: whose it is, and what is otherwise for it.
//!
//! It calls functions rather than scripts, asks the server nothing about the server, and leaves its reports
//! in a tray of its own, from where whoever collects the reports takes them (`trays`): with a right to
//! append to a stream comes one to trim it, and that stream is everybody's.

use super::scripts::{self, TRAY};
use crate::{
    broker_url::BrokerUrl,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// The file beside a credential that has the authorities to trust.
pub(super) const AUTHORITIES: &str = "ca.pem";

/// What a guest connects with: the server of this URL, and of its options those that a guest needs. The
/// authorities to trust go with it, as a file.
///
/// # Errors
/// [`ErrorKind::InvalidUrl`] if their file cannot be read any more.
pub(super) fn url(
    admin: &BrokerUrl,
    queue: &QueueName,
    reports: &QueueName,
    password: &str,
) -> Result<(String, Option<String>)> {
    let mut url = admin.parts().clone();
    // These fail only for a URL without a host.
    let _ = url.set_username(queue.as_str());
    let _ = url.set_password(Some(password));
    let options = url.query_pairs().into_owned().collect::<Vec<_>>();
    let mut authorities = None;
    {
        let mut query = url.query_pairs_mut();
        query.clear();
        query.append_pair("guest", queue.as_str());
        query.append_pair("reports", reports.as_str());
        for (name, value) in options {
            match name.as_str() {
                "lease" | "replicas" => _ = query.append_pair(&name, &value),
                "ca" => {
                    let read = std::fs::read_to_string(&value).map_err(|error| {
                        Error::new(
                            ErrorKind::InvalidUrl,
                            format!("option ca, {value}: {error}"),
                        )
                    })?;
                    authorities = Some(read);
                    query.append_pair(&name, AUTHORITIES);
                }
                _ => {}
            }
        }
    }
    let mut text = url.to_string();
    let others = admin.others();
    if !others.is_empty() {
        let start = text.find('@').map_or(0, |at| at + 1);
        let end = text[start..]
            .find(['/', '?'])
            .map_or(text.len(), |at| start + at);
        text.insert_str(end, &format!(",{}", others.join(",")));
    }
    Ok((text, authorities))
}

#[derive(Clone, Debug)]
pub(super) struct Guest {
    queue: QueueName,
    reports: QueueName,
}

impl Guest {
    /// Reads a URL; `None`: it is of no credential.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidUrl`].
    pub(super) fn of(url: &BrokerUrl) -> Result<Option<Self>> {
        let name = |text: &str| text.parse::<QueueName>().ok();
        let queue = url.option(
            "guest",
            "a guest's queue, as a credential names it",
            |text| name(text).filter(QueueName::is_commands),
        )?;
        let reports = url.option(
            "reports",
            "a queue of reports, as a credential names it",
            |text| name(text).filter(|queue| !queue.is_commands()),
        )?;
        match (queue, reports) {
            (None, None) => Ok(None),
            (Some(queue), Some(reports)) => Ok(Some(Self { queue, reports })),
            _ => Err(Error::new(
                ErrorKind::InvalidUrl,
                format!(
                    "{url}: options guest and reports go together: use the URL of a credential whole"
                ),
            )),
        }
    }

    /// Where its reports are left.
    pub(super) fn tray(&self) -> String {
        scripts::key(&self.queue, TRAY)
    }

    /// A channel of its own to which nobody listens.
    pub(super) fn nobody(&self) -> String {
        scripts::key(&self.queue, "copies")
    }

    /// Fails for what would not come there.
    pub(super) fn may_publish(&self, queue: &QueueName) -> Result<()> {
        if *queue == self.reports {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::AuthRefused,
            format!(
                "this credential of a guest may publish to {} alone: its reports",
                self.reports
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credentials_url_is_read_back() {
        let admin = "redis://root:hunter2@a:1,b:2/3?lease=5s".parse().unwrap();
        let queue: QueueName = "wilco.q.a=2E.1".parse().unwrap();
        let reports: QueueName = "wilco.r.main".parse().unwrap();
        let (url, authorities) = url(&admin, &queue, &reports, "secret").unwrap();
        assert!(authorities.is_none() && !url.contains("hunter2"));
        let url: BrokerUrl = url.parse().unwrap();
        assert_eq!(url.others(), ["b:2"]);
        assert_eq!(url.parts().path(), "/3");
        let guest = Guest::of(&url).unwrap().unwrap();
        assert_eq!(guest.tray(), "wilco:{wilco.q.a=2E.1}:tray");
        guest.may_publish(&reports).unwrap();
        let error = guest.may_publish(&queue).unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::AuthRefused);
    }
}
